"""What a run left out of its data, by name: `bad_samples.jsonl` beside its log, a line an item."""

from collections.abc import Iterable
from pathlib import Path

from mm_interleaved.data.encoding import Skip
from mm_interleaved.runs.ranks import Ranks
from mm_interleaved.training.metrics import LinesFile

BAD_SAMPLES = "bad_samples.jsonl"
"""Of the first rank; the others put a hyphen and their number behind the name."""


class BadSamples:
    """The list of one rank.

    A line has the `step` whose rows the item would have been in, `source`, `place`, `kind` and `reason`. What
    is done again after a crash is listed once.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._file = LinesFile(folder / _name(ranks.rank))

    def begin(self, step: int) -> None:
        """Removes what is said of steps after `step`, by ranks that are no more as well."""
        self._file.cut(step)
        if self.ranks.is_first:
            present = {_name(rank) for rank in range(self.ranks.size)}
            for path in self.folder.glob("bad_samples-*.jsonl"):
                if path.name not in present:
                    LinesFile(path).cut(step)

    def add(self, step: int, skips: Iterable[Skip]) -> None:
        """Lists what was left out on the way to the rows of a step (the first is 1, as in the log)."""
        for skip in skips:
            self._file.write({"step": step, **skip._asdict()})


def _name(rank: int) -> str:
    return BAD_SAMPLES.replace(".", f"-{rank}.") if rank else BAD_SAMPLES
