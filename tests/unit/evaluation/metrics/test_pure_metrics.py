"""Rankings, boxes, choices, maps of classes, intervals: against cases counted by hand."""

import math

import numpy as np
import pytest

from mm_interleaved.evaluation.metrics.boxes import box_accuracy, in_thousandths
from mm_interleaved.evaluation.metrics.choices import (
    choice_accuracy,
    says_yes,
    yes_no_scores,
)
from mm_interleaved.evaluation.metrics.confidence import (
    rank_correlation,
)
from mm_interleaved.evaluation.metrics.retrieval import ndcg, rank_of, ranking_scores
from mm_interleaved.evaluation.metrics.segmentation import confusion, mean_iou
from mm_interleaved.tokens.boxes import box_iou


def test_ranks_of_the_right_answer():
    scores = ranking_scores([[2, 0, 1], [0, 1, 2], []], [2, 2, 0])
    # Ranks 1, 3, and the worst there is.
    assert scores.mrr == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert scores.recall == pytest.approx({1: 1 / 3, 5: 1.0, 10: 1.0})
    assert scores.mean_rank == pytest.approx(7 / 3)
    with pytest.raises(ValueError, match="missing"):
        rank_of(5, [0, 1])
    with pytest.raises(ValueError, match="twice"):
        rank_of(0, [0, 0])
    with pytest.raises(ValueError, match="0 rankings and 1"):
        ranking_scores([], [1])


def test_gain_is_counted_as_far_as_there_are_relevant_candidates():
    relevance = [0.0, 1.0, 0.5, 0.0]
    best = 1 + 0.5 / math.log2(3)
    assert ndcg([1, 2, 0, 3], relevance) == pytest.approx(1.0)
    assert ndcg([2, 1, 0, 3], relevance) == pytest.approx((0.5 + 1 / math.log2(3)) / best)
    # The third place is not counted any more.
    assert ndcg([0, 3, 1, 2], relevance) == 0.0
    with pytest.raises(ValueError, match="each of 4 candidates once"):
        ndcg([0, 1], relevance)
    with pytest.raises(ValueError, match="no candidate is relevant"):
        ndcg([0, 1], [0.0, 0.0])


def test_gain_is_that_of_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    import torch

    rng = np.random.default_rng(0)
    for _ in range(20):
        relevance = np.where(rng.random(8) < 0.5, rng.integers(1, 11, 8) / 10, 0.0)
        relevance[0] = 0.5
        order = rng.permutation(8)
        scores = np.empty(8)
        scores[order] = np.arange(8, 0, -1)
        # Theirs takes whole numbers as gains; ten times the relevance is the same ratio.
        theirs = retrieval.retrieval_normalized_dcg(
            torch.tensor(scores), torch.tensor((relevance * 10).astype(int)), top_k=int((relevance > 0).sum())
        )
        assert ndcg(order.tolist(), relevance.tolist()) == pytest.approx(float(theirs), abs=1e-6)


def test_boxes():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1.0
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0 == box_iou((2, 2, 0, 0), (0, 0, 2, 2))
    # Exactly half counts as found.
    assert box_accuracy([(0, 0, 2, 1), None, (0, 0, 3, 1)], [(0, 0, 1, 1), (0, 0, 1, 1), (0, 0, 1, 1)]) == (
        pytest.approx(1 / 3)
    )
    assert in_thousandths((10, 20, 100, 50), 100, 50) == (100.0, 400.0, 999.0, 999.0)


def test_choices_and_yes_or_no():
    assert choice_accuracy([0, None, 1], [0, 1, 2]) == pytest.approx(1 / 3)
    assert all(map(says_yes, ("Yes", "maybe", "Yes. No.")))
    assert not any(map(says_yes, ("No.", "There is not one", "It isn't")))
    scores = yes_no_scores([True, True, False, False], [True, False, True, False])
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1, scores.yes_ratio) == (0.5,) * 5
    assert yes_no_scores([False], [True]).f1 == 0.0
    with pytest.raises(ValueError, match="found none"):
        yes_no_scores([], [])


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, second = rng.integers(0, 5, 12), rng.integers(0, 5, 12)
        assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="ranks nothing"):
        rank_correlation([1, 1, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="three cases"):
        rank_correlation([1, 2], [1, 2])


def test_maps_of_classes():
    truth = np.array([[0, 0], [1, 2]])
    found = np.array([[0, 1], [1, 7]])
    counted = confusion(found, truth, 3)
    assert counted.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert mean_iou([counted]) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    # Cells of all maps together, and a class that occurs nowhere does not count.
    perfect = confusion(truth, truth, 4)
    assert mean_iou([perfect, perfect]) == 1.0
    assert mean_iou([confusion(found, truth, 3, ignored=2)]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shape"):
        confusion(found, truth[:1], 3)
    with pytest.raises(ValueError, match="found class 2"):
        confusion(found, truth, 2)
