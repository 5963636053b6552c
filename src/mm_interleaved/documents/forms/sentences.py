"""Sentences with images between them, as MMC4 and the official annotations have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_interleaved.documents.document import Image, Part, Text


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image (None: one to be generated) beside a sentence."""

    sentence: int
    is_first: bool
    image: Image | None


def sentences_with_images(sentences: Sequence[str], images: Sequence[PlacedImage]) -> list[Any]:
    """Parts: sentences joined by a space, none beside an image; each image (or None) at its sentence."""
    parts: list[Part | None] = []
    run: list[str] = []

    def end_run():
        text = " ".join(sentence for sentence in run if sentence).strip()
        if text:
            parts.append(Text(text))
        run.clear()

    def add_images(sentence: int, is_first: bool):
        for placed in images:
            if placed.sentence == sentence and placed.is_first == is_first:
                end_run()
                parts.append(placed.image)

    for index, sentence in enumerate(sentences):
        add_images(index, is_first=True)
        run.append(sentence)
        add_images(index, is_first=False)
    end_run()
    return parts
