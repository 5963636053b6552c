"""PororoSV and FlintstonesSV: cartoon stories whose images are strips of video frames.

Read is what `data convert` makes of the published (pickled) annotations, a line a story:
`{"id", "split", "frames": [{"image", "caption"}]}`. A strip holds square frames side by side or one below
the other, as its shape shows; of each strip one frame is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from mm_interleaved.data.source import (
    FilteredItem,
    Item,
    ItemRandom,
    Shard,
)
from mm_interleaved.data.sources.stories import story_document
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import read_items
from mm_interleaved.documents.document import Document, Image
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record
from mm_interleaved.typed_settings import NUMBER, SEED, check


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameStripStories:
    """Stories; by default the first caption and image and the second caption are given."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the strips; by default the folder of the file."""
    split: str | None = None
    """`train`, `val` or `test`; None takes all."""
    num_given: int = 3
    """Parts (captions and images) that are given; negative: counted from the end; 0: all, no target."""
    frame: int | None = None
    """Which frame of a strip is taken (the last one where there are fewer); None chooses by chance, for
    training."""
    seed: Annotated[int, SEED] = 0
    epoch: Annotated[int, NUMBER] = 0

    def __post_init__(self):
        check(self)

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        yield from read_items(shard.name, start, partial(self._document, shard.name, store), known=("split",))

    def _document(
        self, path: str, store: ImageStore, record: Record, position: int
    ) -> Document | FilteredItem:
        story, rng = record.field, ItemRandom(self.seed, self.epoch, path, position)
        if self.split is not None and story["split"].text() != self.split:
            return FilteredItem(record.place, "other_split")
        panels = [
            (
                panel["caption"].text().strip(),
                self._frame(first_image(store, [panel["image"].text()], panel["image"].path), rng),
            )
            for panel in story["frames"].list()
        ]
        return story_document(story["id"].text(), panels, self.num_given, "frames")

    def _frame(self, strip: Image, rng: ItemRandom) -> Image:
        """One square of a strip. It is opened here, as no reference can name a part of a file."""
        pixels = strip.load()
        side = min(pixels.size)
        num_frames = max(pixels.size) // side
        chosen = rng.pick(num_frames) if self.frame is None else min(self.frame, num_frames - 1)
        across, down = (chosen * side, 0) if pixels.width > pixels.height else (0, chosen * side)
        frame = pixels.crop((across, down, across + side, down + side))
        return replace(strip, source=frame, name=f"{strip.name}#{chosen}")
