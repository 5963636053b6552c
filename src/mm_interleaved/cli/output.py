"""What the commands print: results on stdout, everything else on stderr.

What is printed may come from a model or a file: no control sequence of theirs reaches the terminal.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0
"""Of a log that reports how far a command is."""


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
    """How far a command is: a bar on stderr where that is a terminal, elsewhere a line now and then."""

    def __init__(self, show: Callable[[int, str], None]):
        self._show, self._done = show, 0

    def advance(self, text: str):
        """One more is done; `text` says what comes."""
        self._done += 1
        self._show(self._done, text)

    def show(self, text: str):
        """What is going on."""
        self._show(self._done, text)


@contextmanager
def progress(total: int | None, text: str) -> Generator[Progress, None, None]:
    """The progress over `total` things; None where nobody knows how many there are."""
    if sys.stderr.isatty():
        with _bar(total, text) as show:
            yield Progress(show)
    else:
        yield Progress(_lines(total))


def _lines(total: int | None) -> Callable[[int, str], None]:
    """Says how far it is on a line of stderr, at most every SECONDS_BETWEEN_LINES: for logs."""
    last = time.monotonic()

    def show(done: int, text: str):
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of = f"{done} done" if total is None else f"{done} of {total} done"
            say_error(f"{of}, {text}" if text else of)

    return show


@contextmanager
def _bar(total: int | None, text: str) -> Generator[Callable[[int, str], None], None, None]:
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
        task = bar.add_task("", total=total, what=text)
        yield lambda done, what: bar.update(task, completed=done, what=without_controls(what))
