"""Small corpora in memory, with the interface of a source."""

from dataclasses import dataclass, field

from PIL import Image as PILImage

from mm_interleaved.data.source import BrokenItem, FilteredItem, Shard
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import StorageError


@dataclass(frozen=True)
class MemoryCorpus:
    """Lists of items; `failures` counts how often reading a shard's item fails, by (shard, position)."""

    items: tuple[tuple, ...]
    failures: dict = field(default_factory=dict)

    def shards(self):
        return [Shard(f"memory-{index}") for index in range(len(self.items))]

    def read(self, shard, start=0):
        index = int(shard.name.rpartition("-")[2])
        for position, item in enumerate(self.items[index]):
            if position < start:
                continue
            if self.failures.get((index, position), 0):
                self.failures[index, position] -= 1
                raise StorageError("the disk is gone")
            yield position, item


def picture(shade=0, size=8):
    return Image(PILImage.new("RGB", (size, size), (shade % 256, 90, 160)))


UNREADABLE = Image(b"no picture", name="broken.png")
BROKEN = BrokenItem("memory-0:3", "expected an object, found a list")
FILTERED = FilteredItem("memory-0:4", "no_image")


def pair(name, words="a dog", shade=0):
    return Document(id=name, parts=(picture(shade), Text(words)))


def corpus(name, sizes, make=pair):
    """As many documents a shard as `sizes` says, called `<name>-<shard>-<position>`."""
    return MemoryCorpus(
        tuple(
            tuple(make(f"{name}-{shard}-{position}") for position in range(size))
            for shard, size in enumerate(sizes)
        )
    )
