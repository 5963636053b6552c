"""What the commands say: results on stdout, everything else on stderr.

What is said may come from a model or a file: no control sequence of theirs reaches the terminal.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str = "", *, end: str = "\n"):
    """A result, on stdout."""
    print(without_controls(text), end=end, flush=True)


def say_error(sentence: str):
    """One sentence on stderr, one line whatever it holds."""
    line = " ".join(without_controls(sentence).split())
    print(f"mm-interleaved: {line}", file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    """`text` without what moves a cursor, sets a colour or cannot be printed; line ends and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Progress:
    """A bar on stderr where that is a terminal, nothing elsewhere."""

    def __init__(self, bar, task):
        self._bar, self._task = bar, task

    def advance(self, text: str):
        """One more is done; `text` says what comes."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, what=text)

    def tell(self, text: str):
        """What is going on."""
        if self._bar is not None:
            self._bar.update(self._task, what=text)


@contextmanager
def progress(total: int | None, text: str) -> Iterator[Progress]:
    """A progress bar over `total` things; None where nobody knows how many there are."""
    if not sys.stderr.isatty():
        yield Progress(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Progress(bar, bar.add_task("", total=total, what=text))
