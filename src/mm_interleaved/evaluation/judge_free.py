"""Scores of an interleaved answer without a judge: what its parts say of each other, and of what was asked.

The measures themselves are pure (`metrics.interleaved`); here texts and images become what they take.
Whoever reads images for them is a `Reader`: by default the generator under test, whose language model
captions an image and weighs texts against it; a stronger one may be given, and should be where models are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from torch.nn import functional as F

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.evaluation.answers import parts_of
from mm_interleaved.evaluation.metrics.interleaved import (
    IMAGE,
    TEXT,
    consistency,
    copy_rate,
    count_agreement,
    repetition,
    structure,
    word_overlap,
)
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.tokens.task_prompts import CAPTION

CAPTION_TOKENS = 64
GREY, GREY_SIDE = (128, 128, 128), 64


class Reader(Protocol):
    """Whoever reads images."""

    def captions(self, images: Sequence[Image]) -> list[str]:
        """What each image shows, in words."""
        ...

    def weigh(self, texts: Sequence[str], image: Image) -> list[float]:
        """How well each text goes with an image, on any scale that is one for all texts and images."""
        ...

    def embeddings(self, images: Sequence[Image]) -> np.ndarray:
        """(I, D) float32, unit vectors."""
        ...


class GeneratorReader:
    """Reads with an `InterleavedGenerator`."""

    def __init__(self, generator: InterleavedGenerator):
        self.generator = generator

    def captions(self, images: Sequence[Image]) -> list[str]:
        asked = [Document(id=str(n), parts=_asked(image), layout="T") for n, image in enumerate(images)]
        made = self.generator.generate_batch(asked, seed=0, max_new_tokens=CAPTION_TOKENS)
        return [" ".join(p.text for p in one.parts if isinstance(p, Text) and p.generated) for one in made]

    def weigh(self, texts: Sequence[str], image: Image) -> list[float]:
        """Log-probability a token of each text as the image's caption."""
        scores = self.generator.score_options(Document(parts=_asked(image)), texts)
        vocabulary = self.generator.processor.vocabulary
        return [
            score / (len(vocabulary.encode_text(text)) + 1) for score, text in zip(scores, texts, strict=True)
        ]

    @torch.no_grad()
    def embeddings(self, images: Sequence[Image]) -> np.ndarray:
        """The slots that the language model gets of an image, joined."""
        model, rule = self.generator.model, self.generator.processor.encoder_pixels
        pixels = torch.stack([torch.from_numpy(rule(image.load())) for image in images])
        slots_ID = model.encode_images(pixels.to(model.device)).slots.flatten(1).float()
        return F.normalize(slots_ID, dim=-1).cpu().numpy()


def judge_free_scores(question: Document, answer: Document | None, reader: Reader) -> dict[str, float]:
    """All measures that an answer has cases for.

    Args:
        question: with its target where one is known, whose structure is then what is wanted; else the layout.
        answer: its generated parts count.
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
        scores["image_consistency"] = consistency(reader.embeddings([*given, *images]))
    pairs = pairs_of(parts, [part.text for part in question.parts if isinstance(part, Text)][-1:])
    if pairs:
        scores |= _agreement(pairs, reader)
    return scores


def pairs_of(parts: Sequence[Part], text_before: Sequence[str] = ()) -> list[tuple[str, Image]]:
    """Each image with the text that stands before it."""
    pairs: list[tuple[str, Image]] = []
    last = text_before[-1] if text_before else ""
    for part in parts:
        if isinstance(part, Text):
            last = part.text
        elif last:
            pairs.append((last, part))
    return pairs


def _agreement(pairs: Sequence[tuple[str, Image]], reader: Reader) -> dict[str, float]:
    texts, images = [text for text, _ in pairs], [image for _, image in pairs]
    captions = reader.captions(images)
    found = {"caption_round_trip": float(np.mean([*map(word_overlap, texts, captions)]))}
    # Against a grey image, so that texts that are likely in any case do not count as fitting.
    before = reader.weigh(texts, Image(PILImage.new("RGB", (GREY_SIDE, GREY_SIDE), GREY)))
    gains = [
        reader.weigh([text], image)[0] - prior for (text, image), prior in zip(pairs, before, strict=True)
    ]
    return found | {"text_image_agreement": float(np.mean(gains))}


def _wanted(question: Document) -> list[str] | None:
    if question.target:
        return _kinds(question.target)
    return question.layout.split() if question.layout and question.layout != "auto" else None


def _kinds(parts: Sequence[Part]) -> list[str]:
    return [TEXT if isinstance(part, Text) else IMAGE for part in parts]


def _asked(image: Image) -> tuple[Part, ...]:
    return CAPTION.parts(Image(image.source, role=CAPTION.role))


def _array(image: Image) -> np.ndarray:
    return np.asarray(image.load(), np.float32) / 255
