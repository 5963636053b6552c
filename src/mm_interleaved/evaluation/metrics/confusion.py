"""Which values of an attribute are read for which: confusion tables, and the share that is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Confusion:
    """How often each value of an attribute was read as each other, over the documents of a task."""

    task: str
    attribute: str
    order: Sequence[str] = ()
    """In which values stand in the table; unknown ones come first, by name."""
    surplus: frozenset[str] = frozenset()
    """Truths of what is too much, which is nothing that could be lost."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (truth, read)."""

    @property
    def cases(self) -> int:
        """How many there were to keep."""
        return sum(n for (truth, _), n in self.counts.items() if truth not in self.surplus)

    @property
    def lost(self) -> float:
        """Share of the cases that were read otherwise, 0 to 1."""
        right = sum(n for (truth, read), n in self.counts.items() if truth == read)
        return 1 - right / self.cases if self.cases else 0.0

    @property
    def truths(self) -> list[str]:
        """Rows of the table."""
        return self._ordered(truth for truth, _ in self.counts)

    @property
    def reads(self) -> list[str]:
        """Columns of the table: the truths, and whatever else was read."""
        return self._ordered({value for pair in self.counts for value in pair} - self.surplus)

    def _ordered(self, values: Iterable[str]) -> list[str]:
        place = {value: index for index, value in enumerate(self.order)}
        return sorted(set(values), key=lambda value: (place.get(value, -1), value))
