"""Confusion tables, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from mm_interleaved.evaluation.metrics.confusion import Confusion


def test_shares_rows_and_columns():
    counts = Counter({("b", "b"): 6, ("b", "a"): 1, ("a", "gone"): 3, ("(nobody)", "a"): 5})
    found = Confusion(
        task="t",
        attribute="x",
        order=("a", "b", "(nobody)", "gone"),
        surplus=frozenset({"(nobody)"}),
        counts=counts,
    )
    assert found.cases == 10 and found.lost == pytest.approx(0.4)
    assert found.truths == ["a", "b", "(nobody)"] and found.reads == ["a", "b", "gone"]


def test_values_that_nobody_foresaw_come_first_and_nothing_is_lost_of_nothing():
    found = Confusion(task="t", attribute="x", order=("a",), counts=Counter({("a", "z"): 1, ("a", "y"): 1}))
    assert found.reads == ["y", "z", "a"] and found.lost == 1.0
    assert Confusion(task="t", attribute="x").lost == 0.0
