"""Few-shot prompts: each document is asked after examples of its task, with their answers.

Examples are drawn by chance, or are those whose image is nearest (RICES, arXiv 2109.05014), the nearest one
next to the question. None shows the question's own image, or asks its own words where it has no image.
Letters: Q questions, P documents of the pool, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mm_interleaved.data.few_shot import merge_documents
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, escape
from mm_interleaved.seeded_random import SeededRandom

CHOICES = ("random", "nearest")
Embed = Callable[[Sequence[Image]], np.ndarray]
"""Images to (I, D) unit vectors."""
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shots:
    """Which examples a prompt has."""

    count: int
    source: Path
    """The data that they are taken from, in the task's own format."""
    choice: str = "random"
    """One of `CHOICES`."""
    seed: int = 0
    """Of random choice."""

    def record(self) -> dict[str, Any]:
        """For `evaluation.json`."""
        return {
            "count": self.count,
            "from": str(self.source.absolute()),
            "choice": self.choice,
            "seed": self.seed if self.choice == "random" else None,
        }


def choose_examples(
    questions: Sequence[Document], pool: Sequence[Document], shots: Shots, embed: Embed | None = None
) -> dict[str, list[str]]:
    """The ids of each question's examples, in the order of the prompt, by the question's id.

    Args:
        pool: documents with their answers.
        embed: for the choice `nearest`.

    Raises:
        InputError: too few examples of a question's kind, or an image that is missing where it is compared.
    """
    members = [document for document in pool if document.target]
    seen = _Contents()
    nearness_QP = _nearness(questions, members, embed) if shots.choice == "nearest" and embed else None
    kinds = [_kind(member) for member in members]
    chosen: dict[str, list[str]] = {}
    for number, question in enumerate(questions):
        kind = _kind(question)
        places = [place for place, other in enumerate(kinds) if other == kind]
        if nearness_QP is None:
            # A question's examples do not depend on which others are asked.
            rng = SeededRandom(shots.seed, *question.id.encode("utf-8", "backslashreplace"))
            places = rng.sample(places, len(places))
        else:
            places.sort(key=lambda place: -nearness_QP[number, place])
        found: list[str] = []
        for place in places:
            if len(found) == shots.count:
                break
            if not seen.is_same(question, members[place]):
                found.append(members[place].id)
        if len(found) < shots.count:
            raise InputError(
                f"{escape(str(shots.source))}: found {len(found)} examples for document "
                f"{escape(question.id)!r}, expected {shots.count} of its kind with other images and an answer"
            )
        chosen[question.id] = found if nearness_QP is None else found[::-1]
    return chosen


def with_examples(
    questions: Sequence[Document], pool: Sequence[Document], chosen: Mapping[str, Sequence[str]]
) -> list[Document]:
    """The questions, each behind its examples; ids and all else stay the question's."""
    by_id = {document.id: document for document in pool}
    return [
        replace(merge_documents([*(by_id[name] for name in chosen[question.id]), question]), id=question.id)
        for question in questions
    ]


def _kind(document: Document) -> tuple[str, bool]:
    has_roles = any(part.role is not None for part in document.parts)
    return str(document.meta.get("task", "")), has_roles


class _Contents:
    """What documents show, or say where they show nothing; images are opened once."""

    def __init__(self):
        self._known: dict[int, frozenset[bytes]] = {}

    def is_same(self, question: Document, example: Document) -> bool:
        return not self._of(question).isdisjoint(self._of(example))

    def _of(self, document: Document) -> frozenset[bytes]:
        if id(document) not in self._known:
            images = frozenset(image.load().tobytes() for image in document.images)
            text = " ".join(part.text for part in document.parts if isinstance(part, Text))
            found = images or frozenset({text.encode("utf-8", "backslashreplace")})
            self._known[id(document)] = frozenset(sha256(data).digest() for data in found)
        return self._known[id(document)]


def _nearness(questions: Sequence[Document], members: Sequence[Document], embed: Embed) -> np.ndarray:
    """(Q, P): cosines of the first images."""
    sides = ([_first_image(document) for document in side] for side in (questions, members))
    asked_QD, shown_PD = (_embedded(images, embed) for images in sides)
    return asked_QD @ shown_PD.T


def _first_image(document: Document) -> Image:
    images = document.images
    if not images:
        raise InputError(
            f"document {escape(document.id)!r}: has no image, expected one in each to find the nearest"
        )
    return images[0]


def _embedded(images: Sequence[Image], embed: Embed) -> np.ndarray:
    chunks = [embed(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    return np.concatenate(chunks) if chunks else np.zeros((0, 1), np.float32)
