"""Intervals against computations that share nothing with them, and against what is known exactly."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mm_interleaved.evaluation.metrics import confidence
from mm_interleaved.evaluation.metrics.confidence import bootstrap_ratios, interval_of


def paired_by_hand(first, second, resamples, seed):
    """Differences of means over cases, in plain Python, of another generator's resamples."""
    rng = random.Random(seed)
    found = []
    for _ in range(resamples):
        drawn = [rng.randrange(len(first)) for _ in first]
        means = []
        for side in (first, second):
            values = [value for place in drawn for value in side[place]]
            means.append(sum(values) / len(values))
        found.append(means[1] - means[0])
    found.sort()
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def sums_and_counts(*sides):
    return (
        np.array([[sum(values) for values in side] for side in sides], float),
        np.array([[len(values) for values in side] for side in sides], float),
    )


def test_paired_differences_are_those_of_an_independent_computation():
    rng = random.Random(5)
    first = [[rng.random() for _ in range(rng.randrange(1, 4))] for _ in range(80)]
    # Nearly the same documents, so that a bootstrap that is not paired would be far wider.
    second = [[value + 0.05 + 0.02 * rng.random() for value in values] for values in first]
    resampled = bootstrap_ratios(*sums_and_counts(first, second), resamples=4000)
    found = interval_of(0.06, resampled[1] - resampled[0])
    assert (found.low, found.high) == pytest.approx(paired_by_hand(first, second, 4000, 1), abs=4e-4)
    alone = [interval_of(0.5, row) for row in resampled]
    assert found.high - found.low < 0.1 * (alone[0].high - alone[0].low)


def test_documents_are_drawn_with_all_of_their_cases():
    """Of two documents, one of three zeros and one of one one: the mean is 0, 1/4 or 1."""
    resampled = bootstrap_ratios(*sums_and_counts([[0, 0, 0], [1]]), resamples=4000)[0]
    shares = {value: float((resampled == value).mean()) for value in (0.0, 0.25, 1.0)}
    assert shares == {0.0: pytest.approx(0.25, abs=0.03), 0.25: pytest.approx(0.5, abs=0.03),
                      1.0: pytest.approx(0.25, abs=0.03)}  # fmt: skip


def test_resamples_without_a_case_are_left_out():
    resampled = bootstrap_ratios(*sums_and_counts([[], [0.5]]), resamples=400)[0]
    assert 0.15 < np.isnan(resampled).mean() < 0.35
    assert interval_of(0.5, resampled) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="found 0"):
        interval_of(0.5, np.full(3, np.nan))


def interval(values, **more):
    """Of the mean of cases, one a document."""
    resampled = bootstrap_ratios(np.array([values]), np.ones((1, len(values))))[0]
    return interval_of(float(np.mean(values)), resampled, **more)


def test_intervals_hold_the_mean_and_shrink_with_more_cases():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    first, second = interval(few), interval(many)
    assert first.low < 0.5 < first.high and first.mean == second.mean == 0.5
    # Of a share of one half the standard error is 0.5 / sqrt(n).
    assert second.high - second.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=0.1)
    assert interval(few) == first


def test_an_interval_widens_with_the_level():
    values = list(np.random.default_rng(2).random(50))
    assert interval(values, level=0.5).low > interval(values).low
    with pytest.raises(ValueError, match="level between 0 and 1"):
        interval(values, level=1.0)


def test_large_sets_in_rounds_take_the_same_documents_for_all_systems(monkeypatch):
    values = np.random.default_rng(0).random((1, 40))
    sums = np.concatenate([values, values + 1])
    monkeypatch.setattr(confidence, "_MAX_DRAWN", 100)
    resampled = bootstrap_ratios(sums, np.ones_like(sums), resamples=31)
    assert resampled.shape == (2, 31) and np.allclose(resampled[1] - resampled[0], 1)
    assert len(set(resampled[0])) == 31
