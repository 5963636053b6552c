"""Batches of StoryWorld documents; what a step sees is a pure function of (seed, step).

The tasks of the test set are mixed with one of training's own: an interview, many questions about one
picture, which
teaches more about it per second than one question does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.data.source import Item, Shard
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.seeded_random import Dice
from mm_interleaved.spelling import hint
from mm_interleaved.storyworld.questions import FINE_DETAIL, QUESTIONS, RELATIONS, ask_several
from mm_interleaved.storyworld.renderer import render_batch
from mm_interleaved.storyworld.tasks import TASKS, document, picture
from mm_interleaved.storyworld.world import random_scene, scene_to_record
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.processor import MMInterleavedProcessor

INTERVIEW = "interview"
_SHARD_ITEMS = 1024
_SHARDS = 256
# Domains of the dice, so that no two streams share their random numbers (those of storyworld are below 10).
_MIXTURE_DOMAIN = 21
_INTERVIEW_DOMAIN = 22
_STEP_DOMAIN = 23


class DocumentBatch(NamedTuple):
    """A batch and where it comes from."""

    batch: Batch
    documents: tuple[Document, ...]
    words: tuple[tuple[str, ...], ...]
    """The word (or piece of one, without spaces) of each token, row by row."""
    is_blind: bool = False
    """The pictures are not to be looked at: words alone are learned, at a fraction of the cost."""

    @property
    def document_ids(self) -> tuple[str, ...]:
        return tuple(document.id for document in self.documents)

    def to(self, device: torch.device) -> "DocumentBatch":
        """The same, its tensors on a device."""
        return self._replace(batch=self.batch.to(device))


def storyworld_pixels(seed: int):
    """A source of training pictures without documents: (start, count) → (count, 3, 64, 64) float32 in [0,
    1].
    """

    def pixels(start: int, count: int) -> Tensor:
        pictures = torch.from_numpy(render_batch(seed, start, count))
        return pictures.permute(0, 3, 1, 2).float() / 255

    return pixels


def training_document(seed: int, index: int, task_weights: Mapping[str, int]) -> Document:
    """Document number `index` of a training mixture, its target appended to its parts so that all of it is
    learned.

    Args:
        task_weights: tasks of `storyworld.tasks`, or "interview", with integer weights.
    """
    task = Dice(_MIXTURE_DOMAIN, seed, index).weighted(tuple(task_weights), tuple(task_weights.values()))
    if task == INTERVIEW:
        return _interview(seed, index)
    made = document("train", seed, index, task)
    return replace(made, parts=(*made.parts, *made.target), target=())


def _interview(seed: int, index: int) -> Document:
    """A picture, questions about the badge and pattern of each figure, one of each relation, and questions
    about anything.
    """
    dice = Dice(_INTERVIEW_DOMAIN, seed, index)
    scene = random_scene(dice, "train")
    questions = {
        question.text: question
        for figure in scene.figures
        for kind in FINE_DETAIL
        if (question := QUESTIONS[kind](dice, replace(scene, figures=(figure,)))) is not None
    }
    relations = (QUESTIONS[kind](dice, scene) for kind in RELATIONS)
    questions.update((question.text, question) for question in relations if question is not None)
    questions.update((question.text, question) for question in ask_several(dice, scene, 7))
    parts = [picture(scene, "user")]
    for question in dice.sample(list(questions.values()), len(questions)):
        parts += [Text(question.text, role="user"), Text(question.answer, role="assistant")]
    meta = {"task": INTERVIEW, "scenes": [scene_to_record(scene)]}
    return Document(id=f"interview-{seed}-{index}", parts=tuple(parts), meta=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Documents of about the same length, so that rows of one step need little padding."""

    share: int
    """How often a step takes this mixture, against the shares of the others."""
    batch_size: int
    """Documents a step."""
    tasks: Mapping[str, int]
    """Tasks and their integer weights."""
    is_blind: bool = False
    """See `DocumentBatch`."""


class DocumentBatches:
    """Batches with one document a row; each step draws one of the mixtures.

    Args:
        target_pixels: also make what the image decoder has to paint.
        max_images: documents are left out of a batch as soon as it would have more images; None takes all.
    """

    def __init__(
        self,
        processor: MMInterleavedProcessor,
        mixtures: Sequence[Mixture],
        *,
        seed: int,
        target_pixels: bool = False,
        max_images: int | None = None,
    ) -> None:
        self.processor, self.mixtures, self.seed = processor, tuple(mixtures), seed
        self.target_pixels, self.max_images = target_pixels, max_images
        self._stride = max(mixture.batch_size for mixture in mixtures)

    def mixture_of(self, step: int) -> Mixture:
        """The mixture that a step draws."""
        dice = Dice(_STEP_DOMAIN, self.seed, step)
        return dice.weighted(self.mixtures, [mixture.share for mixture in self.mixtures])

    def documents(self, step: int) -> list[Document]:
        """The documents of a step."""
        mixture = self.mixture_of(step)
        first = step * self._stride
        documents, num_images = [], 0
        for index in range(first, first + mixture.batch_size):
            document = training_document(self.seed, index, mixture.tasks)
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
        return DocumentBatch(batch, tuple(documents), words, self.mixture_of(step).is_blind)

    @cached_property
    def _words(self) -> list[str]:
        tokenizer = self.processor.tokenizer
        return [tokenizer.decode([token]).strip() for token in range(len(self.processor.vocabulary))]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryWorldSource:
    """StoryWorld's training documents as a source of documents; nothing is read from a disk.

    Of a task with an answer, the answer alone is learned, unless `learn_prompts`.
    """

    tasks: tuple[str, ...]
    """Tasks of `storyworld.tasks`, or `interview`, in turn."""
    seed: int = 0
    learn_prompts: bool = False
    """Everything counts, what is asked too."""

    def __post_init__(self) -> None:
        known = (*TASKS, INTERVIEW)
        for task in self.tasks:
            if task not in known:
                raise UsageError(f"storyworld has no task {task!r}: {hint(task, known)}")
        if not self.tasks:
            raise UsageError("storyworld: no tasks, expected at least one")

    def shards(self) -> list[Shard]:
        return [Shard(f"storyworld-{number:05d}", _SHARD_ITEMS) for number in range(_SHARDS)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        first = int(shard.name.rpartition("-")[2]) * _SHARD_ITEMS
        for position in range(start, _SHARD_ITEMS):
            index = first + position
            task = self.tasks[index % len(self.tasks)]
            if self.learn_prompts or task == INTERVIEW:
                yield position, training_document(self.seed, index, {task: 1})
            else:
                yield position, document("train", self.seed, index, task)
