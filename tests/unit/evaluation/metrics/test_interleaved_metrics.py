"""Judge-free metrics on answers whose value is plain to see."""

import numpy as np
import pytest

from mm_interleaved.evaluation.metrics.interleaved import (
    consistency,
    copy_rate,
    count_agreement,
    repetition,
    structure,
    word_overlap,
)

AXES = np.eye(4)


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("TITI", "TITI", 1.0),
        ("TTITTI", "TITI", 1.0),
        ("TI", "TITI", 2 * 2 / 6),
        ("", "TI", 0.0),
        ("", "", 1.0),
        ("II", "TT", 0.0),
        ("ITIT", "TITI", 2 * 3 / 8),
    ],
)
def test_structure(found, wanted, score):
    assert structure(found, wanted) == pytest.approx(score)


def test_counts_and_overlaps():
    assert count_agreement(2, 4) == count_agreement(4, 2) == 0.5
    assert count_agreement(0, 0) == 1.0 and count_agreement(0, 3) == 0.0
    assert word_overlap("A red dog", "a red cat") == pytest.approx(2 / 3)
    assert word_overlap("", "a") == 0.0 and word_overlap("Pip!", "pip") == 1.0


def test_images_of_one_subject():
    assert consistency(AXES[[0, 0, 0]]) == 1.0 == consistency(AXES[:1])
    assert consistency(AXES[[0, 0, 1]]) == pytest.approx(1 / 3)
    black, white = np.zeros((4, 4, 3)), np.ones((4, 4, 3))
    assert copy_rate([black, white], [black]) == 0.5
    assert copy_rate([black, black], []) == 0.5
    assert copy_rate([], [black]) == 0.0
    assert copy_rate([black + 1 / 255], [black]) == 1.0


def test_repetition_counts_what_was_there_before():
    assert repetition(["Pip finds a lamp in the garden"]) == 0.0
    assert repetition(["Pip finds a lamp", "Pip finds a lamp"]) == 0.5
    assert repetition(["too short"]) == 0.0
