"""ADE20K: a coloured segmentation map and a caption, answered by the image they belong to.

Files: a list of `{"image_id", "caption"}`, the maps in `annotations_with_color/`, the images in `images/`,
both directly or in a folder named after the list (`training`, `validation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mm_interleaved.data.source import Item, Shard
from mm_interleaved.data.storage.files import stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import read_items
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record

_SUFFIXES = (".png", ".jpg", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationPairs:
    """Map and caption are given, the image is the target."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder or address above `images` and `annotations_with_color`; by default the list's own."""
    is_text_first: bool = False
    """The caption stands before the map."""
    caption_end: str = ""
    """Put behind each caption; the released model's recipe has a full stop."""

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        yield from read_items(shard.name, start, partial(self._document, stem_of(shard.name), store))

    def _document(self, split: str, store: ImageStore, line: Record, position: int) -> Document:
        record = line.field
        image_id = record["image_id"]
        caption = Text(record["caption"].text().strip() + self.caption_end)
        segmentation, image = (
            first_image(store, _names(folder, split, image_id.text()), image_id.path)
            for folder in ("annotations_with_color", "images")
        )
        parts = (caption, segmentation) if self.is_text_first else (segmentation, caption)
        return Document(id=f"{split}:{position}", parts=parts, target=(image,), layout="I")


def _names(folder: str, split: str, image_id: str) -> list[str]:
    return [f"{folder}/{below}{image_id}{suffix}" for below in ("", f"{split}/") for suffix in _SUFFIXES]
