"""Scores of an interleaved answer without a judge: what its parts say of each other, and of what was asked.

All of them are pure. What somebody has to look at images for, a reader looked at while the documents were
answered (`readers.py`), and is given here as a `Reading`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answers import parts_of
from mm_interleaved.evaluation.metrics.interleaved import (
    IMAGE,
    TEXT,
    copy_rate,
    count_agreement,
    repetition,
    structure,
    word_overlap,
)


class Pair(NamedTuple):
    """An image of an answer and the text that stands last before it."""

    text: str
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader found in one answer; lists in JSON."""

    captions: list[str]
    """What each generated image shows, in words."""
    agreements: list[float]
    """How well each image of `pairs_of` goes with its text, on the reader's scale."""
    likeness: float | None
    """How alike all images are, those of the question included: the mean over pairs of images, at most 1.
    None for fewer than two."""

    def record(self) -> dict[str, Any]:
        """For the meta of a document."""
        return asdict(self)


def judge_free_scores(
    question: Document, answer: Document | None, reading: Reading | None = None
) -> dict[str, float]:
    """All measures that an answer has cases for.

    Args:
        question: with its target where one is known, whose structure is then what is wanted; else the layout.
        answer: its generated parts count.
        reading: without one, only what needs nobody to look at images.
    """
    parts = parts_of(answer)
    images = [part for part in parts if isinstance(part, Image)]
    texts = [part.text for part in parts if isinstance(part, Text)]
    scores = {"repetition": repetition(texts)} if texts else {}
    wanted = _wanted(question)
    if wanted is not None:
        kinds = _kinds(parts)
        scores["structure"] = structure(kinds, wanted)
        scores["image_count"] = count_agreement(kinds.count(IMAGE), list(wanted).count(IMAGE))
    if images:
        given = [part for part in question.parts if isinstance(part, Image)]
        scores["copy_rate"] = copy_rate(
            [_array(image) for image in images], [_array(image) for image in given]
        )
    return scores if reading is None else scores | _reading_scores(question, answer, reading)


def _reading_scores(question: Document, answer: Document | None, reading: Reading) -> dict[str, float]:
    pairs = pairs_of(question, answer)
    scores: dict[str, float] = {}
    if pairs:
        captions = reading.captions[-len(pairs) :]
        overlaps = [word_overlap(pair.text, caption) for pair, caption in zip(pairs, captions, strict=True)]
        scores["caption_round_trip"] = fmean(overlaps)
        scores["text_image_agreement"] = fmean(reading.agreements)
    if reading.likeness is not None:
        scores["image_consistency"] = reading.likeness
    return scores


def pairs_of(question: Document, answer: Document | None) -> list[Pair]:
    """Each image of an answer with the text that stands last before it, in the answer or else in the
    question. Images before any text are left out, so that pairs belong to the last images.
    """
    asked = [part.text for part in question.parts if isinstance(part, Text)]
    last = asked[-1] if asked else ""
    pairs: list[Pair] = []
    for part in parts_of(answer):
        if isinstance(part, Text):
            last = part.text or last
        elif last:
            pairs.append(Pair(last, part))
    return pairs


def reading_of(question: Document, answer: Document | None) -> Reading | None:
    """The reading in an answer's meta; None where there is none.

    Raises:
        InputError: it does not belong to the answer.
    """
    record = None if answer is None else answer.meta.get("reading")
    if answer is None or record is None:
        return None

    def refuse(name: str, found: Any, expected: str) -> NoReturn:
        field = f"meta.reading{name}"
        raise InputError(
            f"document {escape(answer.id)!r}: {field}: found {escape(repr(found), 80)}, expected {expected}",
            field=field,
        )

    if not isinstance(record, Mapping) or set(record) != {"captions", "agreements", "likeness"}:
        refuse("", record, "captions, agreements and likeness, as `evaluate` writes them")
    captions, agreements, likeness = record["captions"], record["agreements"], record["likeness"]
    num_images = sum(isinstance(part, Image) for part in parts_of(answer))
    if not _is_list(captions, num_images) or not all(isinstance(text, str) for text in captions):
        refuse(".captions", captions, f"{num_images} strings, one an image")
    num_pairs = len(pairs_of(question, answer))
    if not _is_list(agreements, num_pairs) or not all(map(_is_number, agreements)):
        refuse(".agreements", agreements, f"{num_pairs} numbers, one an image with a text before it")
    if likeness is not None and not _is_number(likeness):
        refuse(".likeness", likeness, "a number or null")
    return Reading(captions=list(captions), agreements=list(agreements), likeness=likeness)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _wanted(question: Document) -> list[str] | None:
    if question.target:
        return _kinds(question.target)
    return question.layout.split() if question.layout and question.layout != "auto" else None


def _kinds(parts: Sequence[Part]) -> list[str]:
    return [TEXT if isinstance(part, Text) else IMAGE for part in parts]


def _array(image: Image) -> np.ndarray:
    return np.asarray(image.load(), np.float32) / 255
