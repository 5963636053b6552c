"""Counted numbers in a few figures, and in bars."""

from __future__ import annotations

import math
from collections import Counter


def summary(counts: Counter[int]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and largest of counted numbers; empty where there are none."""
    total = counts.total()
    if not total:
        return {}
    return {
        "min": min(counts),
        "median": _percentile(counts, 0.5),
        "mean": sum(value * count for value, count in counts.items()) / total,
        "p95": _percentile(counts, 0.95),
        "max": max(counts),
    }


def _percentile(counts: Counter[int], share: float) -> int:
    """The smallest number that at least this share of all is not above."""
    wanted, seen = math.ceil(share * counts.total()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    raise AssertionError("the last number is above none")


def histogram(counts: Counter[int], max_bars: int = 16) -> list[tuple[int, int, int]]:
    """(first, last, how many) of bars of equal width that cover all counted numbers."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = _round_up((high - low + 1) / max_bars)
    first = low // width * width
    bars = Counter((value - first) // width for value in counts.elements()) if width > 1 else None
    if bars is None:
        return [(value, value, counts[value]) for value in range(low, high + 1)]
    return [
        (first + bar * width, first + (bar + 1) * width - 1, bars[bar])
        for bar in range((high - first) // width + 1)
    ]


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10
