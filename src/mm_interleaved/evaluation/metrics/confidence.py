"""How sure a mean is (bootstrap intervals, Efron 1979), and how far two measures rank cases alike
(Spearman).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the bounds between which it lies in so many of a hundred resamples."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The percentile interval of the mean of `values`; the same for the same values.

    Raises:
        ValueError: no values, or a level outside of 0 to 1.
    """
    if not len(values) or not 0 < level < 1:
        raise ValueError(f"expected values and a level between 0 and 1, found {len(values)} and {level}")
    found = np.asarray(values, float)
    chosen = np.random.default_rng(seed).integers(0, len(found), size=(resamples, len(found)))
    means = found[chosen].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(found.mean()), float(low), float(high))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho, -1 to 1: the correlation of ranks, equal values sharing their mean rank.

    Raises:
        ValueError: fewer than three cases, or a side on which all are equal.
    """
    ranks = [_ranks(np.asarray(side, float)) for side in (first, second)]
    if len(ranks[0]) != len(ranks[1]) or len(ranks[0]) < 3:
        raise ValueError(
            f"expected three cases or more on both sides, found {len(ranks[0])} and {len(ranks[1])}"
        )
    if any(np.ptp(side) == 0 for side in ranks):
        raise ValueError("all values of one side are equal, which ranks nothing")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
