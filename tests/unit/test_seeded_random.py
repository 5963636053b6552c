"""Random choices that never change."""

from __future__ import annotations

from collections import Counter

import pytest

from mm_interleaved.seeded_random import SeededRandom


@pytest.mark.parametrize("weights", [(1,), (45, 40, 15), (4, 4, 2, 2, 1), (0, 3, 0), (2**19, 1, 2**18)])
def test_integer_weights_draw_as_integer_arithmetic_does(weights):
    """As the first release drew them: a ticket is a whole number below the sum of the weights."""
    for seed in range(200):
        ticket = SeededRandom(seed).below(sum(weights))
        expected = next(index for index in range(len(weights)) if ticket < sum(weights[: index + 1]))
        assert SeededRandom(seed).weighted(range(len(weights)), weights) == expected


def test_fractions_are_drawn_in_proportion_and_nothing_without_weight_is():
    rng = SeededRandom(3)
    drawn = Counter(rng.weighted("abc", (0.3, 0.0, 0.1)) for _ in range(4000))
    assert set(drawn) == {"a", "c"} and abs(drawn["a"] / 4000 - 0.75) < 0.03
