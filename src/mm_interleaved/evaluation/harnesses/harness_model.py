"""What our models are for any harness: loaded once, with settings that outlast a request."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.documents.document import Part
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.evaluation.harnesses.answers import (
    Asked,
    answer_all,
    file_name,
    text_and_images,
    text_of,
)
from mm_interleaved.evaluation.harnesses.settings import wants_images
from mm_interleaved.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

AUTO_BATCH_SIZE = 8


class HarnessModel:
    """Answers what a harness asks.

    Args:
        name: as everywhere: "storyworld", a folder, or a hub id.
        device: a torch device; "auto" is a GPU where there is one, the one of this process under a launcher.
        dtype: as everywhere.
        batch_size: documents at once, as a number or in words; "auto" is `AUTO_BATCH_SIZE`.
        images: folder for generated images.
        conversation: whether what is asked is what a user says to an assistant; where not given, if text
            alone is wanted. A model that never saw conversations wants False.
        settings: generation settings by name, used where a request says nothing else.

    Raises:
        UsageError: a setting that cannot be.
        ModelFileError: no model of ours.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = AUTO_BATCH_SIZE,
        images: str | Path,
        conversation: bool | None = None,
        settings: Mapping[str, Any],
    ):
        GenerationSettings.combine(settings)
        self.name, self.dtype, self.device = name, dtype, device or _own_device()
        self.batch_size, self.images = _batch_size(batch_size), Path(images)
        self.conversation, self.settings = conversation, dict(settings)

    @cached_property
    def generator(self) -> InterleavedGenerator:
        from mm_interleaved.generation.loading import load_generator

        return load_generator(self.name, device=self.device, dtype=self.dtype)

    def unload(self):
        """Gives the model's memory back; it is loaded again when it is next needed."""
        self.__dict__.pop("generator", None)

    def is_conversation(self, layout: str) -> bool:
        """Whether a request whose answer has this layout is a turn of a conversation."""
        return not wants_images(layout) if self.conversation is None else self.conversation

    def answer(self, asked: Sequence[Asked], *, quiet: bool = False) -> list[tuple[Part, ...]]:
        """See `answer_all`."""
        return answer_all(self.generator, asked, batch_size=self.batch_size, quiet=quiet)

    def written(self, parts: Sequence[Part], layout: str, task: str, key: str) -> str:
        """The string of an answer: its text; with its images, as `text_and_images`, where it may hold any."""
        if not wants_images(layout):
            return text_of(parts)
        return text_and_images(parts, self.images / file_name(task), key)


def _own_device() -> str:
    """`auto`, or this process' GPU where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "auto"
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "auto"


def _batch_size(given: int | str) -> int:
    words = str(given)
    if words.split(":")[0] == "auto":
        return AUTO_BATCH_SIZE
    if not (words.isascii() and words.isdigit() and int(words) > 0):
        raise UsageError(f"batch_size: found {escape(words)!r}, expected a number from 1, or auto")
    return int(words)
