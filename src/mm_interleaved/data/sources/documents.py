"""Our JSONL, and every other form of record that `document_formats` knows: LLaVA, ShareGPT, OpenAI, OBELICS
lines, CoMM, pairs, `annt.json`. Conversations keep all their turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mm_interleaved.data.sources.image_stores import found_with_images, image_store
from mm_interleaved.data.sources.records import read_items
from mm_interleaved.data.sources.source import Item, Shard
from mm_interleaved.document import Document
from mm_interleaved.document_formats import read_record
from mm_interleaved.strict_json import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFiles:
    """Files of documents: `.jsonl`, `.json` (one object or a list), or a zip of one such file."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the folder of each file."""
    skip_missing_images: bool = False
    """Leave out images that are not there, instead of calling the document broken."""

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=self.skip_missing_images)

        def build(record: Record, _: int) -> Document:
            return read_record(record, store)

        yield from read_items(shard.name, start, build)
