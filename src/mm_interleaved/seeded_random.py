"""Random choices that are the same on every machine and with every release of NumPy.

NumPy promises that the raw words of a bit generator and of SeedSequence never change, but not how `Generator`
turns them into numbers. So we draw raw 64-bit words and do the last step, an integer multiplication,
ourselves.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_WORDS_PER_REFILL = 64
_PARTS_OF_ONE = 1 << 32


class SeededRandom:
    """A stream of choices that is a pure function of its seeds (integers, 0 or more)."""

    def __init__(self, *seeds: int) -> None:
        if any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds must be 0 or more, found {seeds}")
        self._bits = np.random.PCG64(np.random.SeedSequence(seeds))
        self._words: list[int] = []

    def below(self, limit: int) -> int:
        """An integer in [0, limit); the bias, below 2^-32 * limit, does not matter here."""
        if not self._words:
            self._words = self._bits.random_raw(_WORDS_PER_REFILL).tolist()
        return ((self._words.pop() >> 32) * limit) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, each as likely as the others."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        assert count <= len(items), f"{count} of {len(items)} items asked for"
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, in proportion to its weight (0 or more, not all 0)."""
        # Exact for integer weights below 2^20: a ticket then has at most 52 bits, which float64 holds.
        ticket = self.below(_PARTS_OF_ONE) / _PARTS_OF_ONE * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            if ticket < weight:
                return item
            ticket -= weight
        # Sums of fractions are rounded: what is beyond the last weight belongs to it.
        return next(item for item, weight in zip(reversed(items), reversed(weights), strict=True) if weight)
