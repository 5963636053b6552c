"""LAION-style lines: JSON lines (`0000000.txt`, `.jsonl`) of `image` and `caption`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from mm_interleaved.data.source import (
    FilteredItem,
    Item,
    ItemRandom,
    Shard,
)
from mm_interleaved.data.sources.pairs import caption_of, pair_parts
from mm_interleaved.data.storage.files import stem_of
from mm_interleaved.data.storage.image_stores import found_with_images, image_store
from mm_interleaved.data.storage.records import read_items
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record
from mm_interleaved.typed_settings import NUMBER, SEED, SHARE, check


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLines:
    """Pairs out of lines; the defaults are those of the released model's training."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the folder of each file."""
    image_first_share: Annotated[float, SHARE] = 0.5
    """The image stands before its caption in this share (0 to 1) of the documents."""
    lower_case: bool = True
    """Captions in lower case."""
    min_characters: int = 1
    """Pairs with a shorter caption are left out."""
    seed: Annotated[int, SEED] = 0
    epoch: Annotated[int, NUMBER] = 0

    def __post_init__(self):
        check(self)

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name)
        build = partial(self._document, shard.name, store)
        yield from read_items(shard.name, start, build, known=("url", "image_url"))

    def _document(
        self, path: str, store: ImageStore, record: Record, position: int
    ) -> Document | FilteredItem:
        caption = caption_of(record.field["caption"])
        if len(caption) < self.min_characters:
            return FilteredItem(record.place, "short_caption")
        image = store.image(record.field["image"])
        assert image is not None, "this store raises where an image is missing"
        parts = pair_parts(
            image,
            caption,
            ItemRandom(self.seed, self.epoch, path, position),
            image_first_share=self.image_first_share,
            lower_case=self.lower_case,
        )
        return Document(id=f"{stem_of(path)}:{position}", parts=parts)
