"""Examples in docstrings are run, not only read."""

import doctest

import mm_interleaved.models.synchronizer


def test_the_example_of_the_synchronizer_runs():
    result = doctest.testmod(mm_interleaved.models.synchronizer)
    assert result.attempted > 0 and result.failed == 0
