"""Whoever looks at the images of interleaved answers, while documents are answered: scoring loads no model.

What is found is kept with the answer as a `Reading` (`judge_free.py`). By default the generator under test
reads: what it says of an image is compared with texts, and with what it says of other images. Models are
better compared by one reader for all: a CLIP weighs images against texts and against each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.answers import answer_images
from mm_interleaved.evaluation.extractors import ClipEmbedder
from mm_interleaved.evaluation.judge_free import Pair, Reading, pairs_of
from mm_interleaved.evaluation.metrics.interleaved import phrase_overlap, word_recall
from mm_interleaved.generation.events import Event, Finished
from mm_interleaved.tokens.task_prompts import CAPTION

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.runs.engine import Answer

CAPTION_TOKENS = 64

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Whoever reads images."""

    def captions(self, images: Sequence[Image]) -> list[str]:
        """What each image shows, in words."""
        ...

    def agreements(
        self, texts: Sequence[str], images: Sequence[Image], captions: Sequence[str]
    ) -> list[float]:
        """How well each text goes with the image of the same place, the more the better.

        Args:
            captions: of the images.
        """
        ...

    def likeness(self, images: Sequence[Image], captions: Sequence[str]) -> float:
        """How alike two or more images are, at most 1.

        Args:
            captions: of each.
        """
        ...


class GeneratorReader:
    """Reads with an `InterleavedGenerator`."""

    def __init__(self, generator: InterleavedGenerator):
        self.generator = generator

    def captions(self, images: Sequence[Image]) -> list[str]:
        asked = [Document(id=str(n), parts=_asked(image), layout="T") for n, image in enumerate(images)]
        made = self.generator.generate_batch(asked, seed=0, max_new_tokens=CAPTION_TOKENS)
        return [" ".join(p.text for p in one.parts if isinstance(p, Text) and p.generated) for one in made]

    def agreements(
        self, texts: Sequence[str], images: Sequence[Image], captions: Sequence[str]
    ) -> list[float]:
        """The share of a text's words that are said of the image, too. How likely a text is as the caption
        ranks stories worse, since that depends on how it is worded as well.
        """
        return list(map(word_recall, texts, captions))

    def likeness(self, images: Sequence[Image], captions: Sequence[str]) -> float:
        """By what is said of the images, in pairs of words ("green rabbit"): as wholes, images are alike by
        their place more than by who stands in it.
        """
        return fmean(phrase_overlap(one, other) for one, other in combinations(captions, 2))

    @torch.no_grad()
    def embeddings(self, images: Sequence[Image]) -> np.ndarray:
        """(I, D) float32, unit vectors: the slots that the language model gets of an image, joined."""
        model, rule = self.generator.model, self.generator.processor.encoder_pixels
        pixels = torch.stack([torch.from_numpy(rule(image.load())) for image in images])
        slots_ID = model.encode_images(pixels.to(model.device)).slots.flatten(1).float()
        return F.normalize(slots_ID, dim=-1).cpu().numpy()


class ClipReader:
    """Weighs texts and images by the cosines of a CLIP; captions are the generator's own.

    Args:
        writer: of captions.
    """

    def __init__(self, embedder: ClipEmbedder, writer: GeneratorReader):
        self.embedder, self.writer = embedder, writer

    def captions(self, images: Sequence[Image]) -> list[str]:
        return self.writer.captions(images)

    def agreements(
        self, texts: Sequence[str], images: Sequence[Image], captions: Sequence[str]
    ) -> list[float]:
        return (self.embedder.texts(texts) * self._embeddings(images)).sum(1).tolist()

    def likeness(self, images: Sequence[Image], captions: Sequence[str]) -> float:
        """The mean cosine."""
        found_ID = self._embeddings(images)
        return fmean(float(one @ other) for one, other in combinations(found_ID, 2))

    def _embeddings(self, images: Sequence[Image]) -> np.ndarray:
        return self.embedder.images([image.load().convert("RGB") for image in images])


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """A reader, made of the generator that answers, where it is needed."""

    name: str
    """Makes two runs differ."""
    make: Callable[[Any], Reader]


def readers_of(clip: str | None) -> Readers:
    """The model under test; or, for how well texts and images go together, a CLIP, a folder or a hub id."""
    if clip is None:
        return Readers(name="the model itself", make=GeneratorReader)
    return Readers(
        name=f"clip {clip}",
        make=lambda generator: ClipReader(ClipEmbedder(clip), GeneratorReader(generator)),
    )


def read_answer(question: Document, answer: Document, reader: Reader) -> Reading:
    """What a reader finds in an answer. Raises InputError where a text does not fit its context."""
    made = answer_images(answer)
    given = [part for part in question.parts if isinstance(part, Image)]
    captions = reader.captions([*given, *made]) if made else []
    pairs = pairs_of(question, answer)
    return Reading(
        captions=captions[len(given) :],
        agreements=_agreements(pairs, captions, reader),
        likeness=reader.likeness([*given, *made], captions) if made and len(captions) > 1 else None,
    )


def _agreements(pairs: Sequence[Pair], captions: Sequence[str], reader: Reader) -> list[float]:
    if not pairs:
        return []
    texts, images = zip(*pairs, strict=True)
    return reader.agreements(texts, images, captions[-len(pairs) :])


def answers_read(answer: Answer, readers: Readers, questions: Sequence[Document]) -> Answer:
    """The same answers, each with the reading of it in the meta of the finished document.

    Args:
        questions: as they are without examples before them; those that are answered are among them, by id.
    """
    own = {question.id: question for question in questions}
    made: list[Reader] = []

    def answer_and_read(
        generator: Any, documents: Sequence[Document], *others: Any
    ) -> Iterator[tuple[int, Event]]:
        made[:] = made or [readers.make(generator)]
        for place, event in answer(generator, documents, *others):
            if isinstance(event, Finished):
                question = own[documents[place].id]
                event = replace(event, document=_with_reading(question, event.document, made[0]))
            yield place, event

    return answer_and_read


def _with_reading(question: Document, finished: Document, reader: Reader) -> Document:
    answer = replace(finished, parts=tuple(part for part in finished.parts if part.generated))
    if not answer.parts:
        return finished
    try:
        reading = read_answer(question, answer, reader)
    except InputError as error:
        logger.warning("document %r: its answer is not read (%s); it counts as wrong", question.id, error)
        images, pairs = answer_images(answer), pairs_of(question, answer)
        reading = Reading(captions=[""] * len(images), agreements=[0.0] * len(pairs), likeness=None)
    return replace(finished, meta={**finished.meta, "reading": reading.record()})


def _asked(image: Image) -> tuple[Part, ...]:
    return CAPTION.parts(Image(image.source, role=CAPTION.role))
