"""How sure a mean is (bootstrap intervals, Efron 1979), and how far two measures rank cases alike
(Spearman).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MAX_DRAWN = 4_000_000


class Interval(NamedTuple):
    """A mean and the bounds between which it lies in so many of a hundred resamples."""

    mean: float
    low: float
    high: float


def bootstrap_ratios(
    sums_KN: np.ndarray, counts_KN: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means over cases, of so many resamples of documents: a document is taken with all of its cases, or not.

    All K systems are computed on the same resamples, so the difference of two rows is the paired bootstrap.

    Args:
        sums_KN: by system and document, the sum of its cases.
        counts_KN: how many cases that were; 0 where there were none.

    Returns:
        (K, resamples); NaN where a resample has no case.
    """
    num_systems, num_documents = sums_KN.shape
    rng = np.random.default_rng(seed)
    # Large sets are done in rounds, so that the indices take little memory.
    round_size = max(1, _MAX_DRAWN // num_documents)
    rounds = []
    for begin in range(0, resamples, round_size):
        size = min(round_size, resamples - begin)
        drawn_RN = rng.integers(0, num_documents, size=(size, num_documents))
        totals = [(sums_KN[k][drawn_RN].sum(1), counts_KN[k][drawn_RN].sum(1)) for k in range(num_systems)]
        with np.errstate(invalid="ignore", divide="ignore"):
            rounds.append(np.stack([total / count for total, count in totals]))
    return np.concatenate(rounds, axis=1)


def interval_of(value: float, resampled: np.ndarray, *, level: float = 0.95) -> Interval:
    """The percentile interval around a value, of what resamples give; those without a case are left out.

    Raises:
        ValueError: a level outside of 0 to 1, or no resample has a case.
    """
    found = resampled[~np.isnan(resampled)]
    if not 0 < level < 1 or not len(found):
        raise ValueError(f"expected resamples and a level between 0 and 1, found {len(found)} and {level}")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


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
