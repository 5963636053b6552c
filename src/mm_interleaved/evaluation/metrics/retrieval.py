"""Where the right answers stand in a ranking of candidates: visual dialogue (VisDial v1.0, arXiv 1611.08669).

Rankings are indices of candidates, from the best to the worst; ranks count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingScores:
    """Means over questions, but for `mean_rank` all from 0 to 1."""

    mrr: float
    """Mean of 1 / rank of the right answer."""
    recall: dict[int, float]
    """Share of right answers among the first 1, 5, 10."""
    mean_rank: float


def ranking_scores(rankings: Sequence[Sequence[int]], gold: Sequence[int]) -> RankingScores:
    """How early the one right answer comes.

    Args:
        rankings: of each question, every candidate once. An empty one counts as the last rank of the longest.
        gold: index of the right candidate of each question.

    Raises:
        ValueError: no questions, a ranking that is none, or lacks the right answer.
    """
    if not rankings or len(rankings) != len(gold):
        raise ValueError(
            f"found {len(rankings)} rankings and {len(gold)} right answers, expected as many of each"
        )
    worst = max(map(len, rankings)) or 1
    ranks = [
        rank_of(right, ranking) if ranking else worst for ranking, right in zip(rankings, gold, strict=True)
    ]
    return RankingScores(
        mrr=fmean(1 / rank for rank in ranks),
        recall={limit: fmean(rank <= limit for rank in ranks) for limit in RECALL_AT},
        mean_rank=fmean(ranks),
    )


def rank_of(candidate: int, ranking: Sequence[int]) -> int:
    """The rank of a candidate, from 1. Raises ValueError where the ranking is none or lacks it."""
    if len(set(ranking)) < len(ranking):
        raise ValueError(f"ranking: a candidate occurs twice in {list(ranking)[:10]}")
    if candidate not in ranking:
        raise ValueError(f"ranking: candidate {candidate} is missing among {len(ranking)}")
    return list(ranking).index(candidate) + 1


def ndcg(ranking: Sequence[int], relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of one ranking, 0 to 1, as VisDial's evaluator defines it.

    Counted down to the k-th place, k being the number of candidates that anyone finds relevant:
    DCG = sum over places i = 1..k of relevance / log2(i + 1), divided by that of the best order.

    Args:
        relevance: of every candidate, 0 to 1 (`gt_relevance` of the dense annotations).

    Raises:
        ValueError: the ranking does not hold every candidate once, or none is relevant.
    """
    if sorted(ranking) != list(range(len(relevance))):
        raise ValueError(
            f"ranking: expected each of {len(relevance)} candidates once, found {list(ranking)[:10]}"
        )
    num_relevant = sum(value > 0 for value in relevance)
    if not num_relevant:
        raise ValueError("relevance: no candidate is relevant")
    best = sorted(relevance, reverse=True)[:num_relevant]
    return _dcg([relevance[index] for index in ranking[:num_relevant]]) / _dcg(best)


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(place + 2) for place, gain in enumerate(gains))
