"""Our JSONL, and every other form of record that `documents.formats` knows: LLaVA, ShareGPT, OpenAI, OBELICS
lines, CoMM, pairs, `annt.json`, the `metadata.jsonl` or `metadata.csv` of a folder of images. Conversations
keep all their turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mm_interleaved.data.source import BrokenItem, Item, Shard, attempt
from mm_interleaved.data.storage.image_stores import found_with_images, image_store
from mm_interleaved.data.storage.records import read_records
from mm_interleaved.documents.formats import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFiles:
    """Files of documents: `.jsonl`, `.json` (one object or a list), either as `.gz` or `.zip`; `.csv`."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the folder of each file."""
    skip_missing_images: bool = False
    """Leave out images that are not there, instead of calling the document broken."""

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=self.skip_missing_images)
        for position, record in read_records(shard.name, start):
            if isinstance(record, BrokenItem):
                yield position, record
            else:
                # Which fields of a record are used is watched there, for commands that know no sources too.
                yield position, attempt(record.place, partial(read_record, record, store))
