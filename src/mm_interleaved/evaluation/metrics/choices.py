"""Questions with given choices: letters (SEED-Bench and the like) and yes or no (POPE, arXiv 2305.10355)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

_NO = re.compile(r"\b(no|not)\b|n't\b", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])(?:[).:,]|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class YesNoScores:
    """POPE's five numbers, 0 to 1; "yes" is the positive class."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """How often yes was answered: hallucinating models say it too often."""


def choice_accuracy(chosen: Sequence[int | None], gold: Sequence[int]) -> float:
    """Share of right choices; no choice is wrong."""
    return fmean(one == right for one, right in zip(chosen, gold, strict=True)) if gold else 0.0


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer is: its words, or its letter ("B", "(b)", "B. two"); None is neither."""
    words = answer.strip().rstrip(".").lower()
    matches = [place for place, choice in enumerate(choices) if choice.strip().rstrip(".").lower() == words]
    if matches:
        return matches[0]
    letter = _LETTER.match(answer.strip().upper())
    place = -1 if letter is None else ord(letter[1]) - ord("A")
    return place if 0 <= place < len(choices) else None


def says_yes(answer: str) -> bool:
    """POPE's reading: the first sentence counts, and whatever does not deny is a yes."""
    first = answer.split(".")[0].replace(",", " ")
    return _NO.search(first) is None


def yes_no_scores(answers: Sequence[bool | None], truths: Sequence[bool]) -> YesNoScores:
    """Scores of yes and no; None is neither, and wrong. Ratios with nothing below the line are 0."""
    pairs = list(zip(answers, truths, strict=True))
    if not pairs:
        raise ValueError("answers: found none")
    hits = sum(bool(answer) and truth for answer, truth in pairs)
    said, true = sum(bool(answer) for answer in answers), sum(truths)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    return YesNoScores(
        accuracy=fmean(answer == truth for answer, truth in pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=said / len(pairs),
    )
