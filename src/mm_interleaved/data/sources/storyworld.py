"""StoryWorld's training documents, drawn as they are asked for: nothing is read from a disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mm_interleaved.data.source import Item, Shard
from mm_interleaved.errors import UsageError
from mm_interleaved.spelling import hint
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.catalogue import ALL_TASKS, document_of
from mm_interleaved.storyworld.detail.boards import IMAGE_SIZES
from mm_interleaved.storyworld.detail.documents import DETAIL_TASKS
from mm_interleaved.storyworld.training_documents import INTERVIEWS, training_document

_SHARD_ITEMS = 1024
_SHARDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryWorldSource:
    """Documents of the training split, of one task after another; seeds share none."""

    takes_run_seed: ClassVar[bool] = True

    paths: tuple[str, ...]
    """Tasks of `storyworld.catalogue`, or an interview of `training_documents`, in turn."""
    seed: int = 0
    """Seed of the documents; a training run gives its own."""
    image_size: int = IMAGE_SIZE
    """Pixels a side of all images: 64, or 128 where all tasks are about boards (`detail_...`)."""

    def __post_init__(self) -> None:
        known = (*ALL_TASKS, *INTERVIEWS)
        if isinstance(self.paths, str):
            object.__setattr__(self, "paths", (self.paths,))
        for task in self.paths:
            if task not in known:
                raise UsageError(f"storyworld has no task {task!r}: {hint(task, known)}", field="paths")
        if not self.paths:
            raise UsageError("storyworld: no tasks, expected at least one", field="paths")
        if self.seed < 0:
            raise UsageError(f"storyworld: seed must be 0 or more, found {self.seed}", field="seed")
        sizes = IMAGE_SIZES if set(self.paths) <= set(DETAIL_TASKS) else (IMAGE_SIZE,)
        if self.image_size not in sizes:
            expected = " or ".join(map(str, sizes))
            raise UsageError(
                f"storyworld: image_size of {', '.join(self.paths)} must be {expected}, "
                f"found {self.image_size}",
                field="image_size",
            )

    def shards(self) -> list[Shard]:
        return [Shard(f"storyworld-{number:05d}", _SHARD_ITEMS) for number in range(_SHARDS)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        first = int(shard.name.rpartition("-")[2]) * _SHARD_ITEMS
        for position in range(start, _SHARD_ITEMS):
            index = first + position
            task = self.paths[index % len(self.paths)]
            if task in INTERVIEWS:
                yield position, training_document(self.seed, index, {task: 1})
            else:
                yield position, document_of("train", self.seed, index, task, self.image_size)
