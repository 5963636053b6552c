"""Batches of StoryWorld documents; what a step sees is a pure function of (seed, step)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.detail.boards import detail_scene_at
from mm_interleaved.storyworld.detail.rendering import render_detail
from mm_interleaved.storyworld.renderer import render_batch, render_scene, scene_at
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.storyworld.world import Scene
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.processor import MMInterleavedProcessor

# Domain of the seeds, so that no two streams share their random numbers.
_STEP_DOMAIN = 23


class DocumentBatch(NamedTuple):
    """A batch and where it comes from."""

    batch: Batch
    documents: tuple[Document, ...]
    words: tuple[tuple[str, ...], ...]
    """The word (or piece of one, without spaces) of each token, row by row."""
    is_text_only: bool = False
    """The model sees no image of it: from text alone it learns at a fraction of the cost."""

    @property
    def document_ids(self) -> tuple[str, ...]:
        return tuple(document.id for document in self.documents)

    def to(self, device: torch.device) -> "DocumentBatch":
        """The same, its tensors on a device."""
        return self._replace(batch=self.batch.to(device))


def storyworld_pixels(seed: int, boards: bool = False):
    """A source of images without documents: (start, count) → (count, 3, 64, 64) float32 in [0, 1].

    Args:
        boards: two of three images show a board.
    """

    def pixels(start: int, count: int) -> Tensor:
        images = torch.from_numpy(training_images(seed, start, count, boards)[1])
        return images.permute(0, 3, 1, 2).float() / 255

    return pixels


def training_images(
    seed: int, start: int, count: int, boards: bool = False
) -> tuple[list[Scene], np.ndarray]:
    """Scenes of the training split, apart from their boards, and their images (count, 64, 64, 3) uint8.

    Args:
        boards: two of three images show a board.
    """
    if not boards:
        scenes = [scene_at("train", seed, index) for index in range(start, start + count)]
        return scenes, render_batch(seed, start, count)
    scenes, images = [], []
    for index in range(start, start + count):
        if index % 3:
            detail = detail_scene_at("train", seed, index)
            scenes.append(detail.scene)
            images.append(render_detail(detail))
        else:
            scenes.append(scene_at("train", seed, index))
            images.append(render_scene(scenes[-1]))
    return scenes, np.stack(images)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKind:
    """What a batch may be of: documents of about the same length, so that its rows need little padding."""

    share: int
    """How often a step samples this kind, against the shares of the others."""
    batch_size: int
    """Documents a step."""
    tasks: Mapping[str, int]
    """Tasks and their integer weights."""
    is_text_only: bool = False
    """See `DocumentBatch`."""


class DocumentBatches:
    """Batches with one document a row; each step samples one of the kinds.

    Args:
        target_pixels: also make what the image decoder has to denoise.
        max_images: documents are left out of a batch as soon as it would have more images; None takes all.
    """

    def __init__(
        self,
        processor: MMInterleavedProcessor,
        kinds: Sequence[BatchKind],
        *,
        seed: int,
        target_pixels: bool = False,
        max_images: int | None = None,
    ) -> None:
        self.processor, self.kinds, self.seed = processor, tuple(kinds), seed
        self.target_pixels, self.max_images = target_pixels, max_images
        self._stride = max(kind.batch_size for kind in kinds)

    def kind_of(self, step: int) -> BatchKind:
        """The kind of batch that a step samples."""
        rng = SeededRandom(_STEP_DOMAIN, self.seed, step)
        return rng.weighted(self.kinds, [kind.share for kind in self.kinds])

    def documents(self, step: int) -> list[Document]:
        """The documents of a step."""
        kind = self.kind_of(step)
        first = step * self._stride
        documents, num_images = [], 0
        for index in range(first, first + kind.batch_size):
            document = training_document(self.seed, index, kind.tasks)
            num_images += sum(isinstance(part, Image) for part in document.parts)
            if documents and self.max_images is not None and num_images > self.max_images:
                break
            documents.append(document)
        return documents

    def __call__(self, step: int) -> DocumentBatch:
        """The batch of a step."""
        documents = self.documents(step)
        batch = self.processor(documents, eos=True, target_pixels=self.target_pixels)
        words = tuple(tuple(self._words[token] for token in row) for row in batch.input_ids.tolist())
        return DocumentBatch(batch, tuple(documents), words, self.kind_of(step).is_text_only)

    @cached_property
    def _words(self) -> list[str]:
        tokenizer = self.processor.tokenizer
        return [tokenizer.decode([token]).strip() for token in range(len(self.processor.vocabulary))]
