"""The inspection of a source: what is there, what is broken, how long, how large, and what it looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image as PILImage

from mm_interleaved.data.check_report import (
    MAX_KINDS,
    BrokenImage,
    RemarkCount,
    Report,
    Sample,
    SampledImage,
    SampledText,
)
from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, Shard, Source, items_of
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import read_regular_file
from mm_interleaved.errors import ImageError, InputError
from mm_interleaved.seeded_random import SeededRandom

NUM_SAMPLES = 48
"""Documents on the contact sheet."""
_THUMBNAIL_SIDE = 160
_SAMPLE_DOMAIN = 31

CountTokens = Callable[[Document], int]


class Inspection:
    """Goes through a source and keeps a report.

    Args:
        name: how the report calls the source.
        count_tokens: tokens of a document, its target included; None leaves them out.
        opens_images: open each image; otherwise only those on the contact sheet.
        max_items: items to read, of each shard; None reads all.
        num_samples: documents for the contact sheet, chosen evenly by chance, the same in each inspection.
    """

    def __init__(
        self,
        name: str,
        *,
        count_tokens: CountTokens | None = None,
        opens_images: bool = True,
        max_items: int | None = None,
        num_samples: int = NUM_SAMPLES,
    ):
        self.report = Report(name)
        self.is_finished = False
        """Whether it came to the end."""
        self.count_tokens, self.opens_images, self.max_items = count_tokens, opens_images, max_items
        self.num_samples = num_samples
        self._rng = SeededRandom(_SAMPLE_DOMAIN)
        self._names_by_hash: dict[bytes, int] = {}

    def items(self, source: Source, shards: Sequence[Shard]) -> Iterator[Item]:
        """Each item, once it is counted; what is wrong with it stands in the report by then."""
        for shard in shards:
            for _, item in islice(items_of(source, shard), self.max_items):
                self._count(item)
                yield item
        self.is_finished = True

    def _count(self, item: Item):
        if isinstance(item, BrokenItem):
            self.report.num_broken += 1
            self.report.faults.add(item)
        elif isinstance(item, FilteredItem):
            self.report.filtered[item.rule] += 1
        else:
            self._count_document(item)

    def _count_document(self, document: Document):
        report = self.report
        if self.count_tokens is not None and not self._count_tokens(document, self.count_tokens):
            return
        place = self._sample_place(report.num_documents)
        report.num_documents += 1
        self._count_remarks(document)
        parts = (*document.parts, *document.target)
        texts = [part.text for part in parts if isinstance(part, Text)]
        images = [part for part in parts if isinstance(part, Image)]
        report.num_texts += len(texts)
        report.num_images += len(images)
        report.images_a_document[len(images)] += 1
        report.characters[sum(map(len, texts))] += 1
        missing = document.meta.get("missing_images")
        report.num_missing_images += missing if isinstance(missing, int) else 0
        if self.opens_images or place is not None:
            opened = [self._opened(part, document) for part in images]
        else:
            opened = []
        if place is not None:
            report.samples[place : place + 1] = [_sample(document, opened)]

    def _count_tokens(self, document: Document, count_tokens: CountTokens) -> bool:
        """False where it has none: such a document is a broken item."""
        try:
            self.report.tokens[count_tokens(document)] += 1
        except InputError as error:
            self.report.num_broken += 1
            place = f"{document.place}: document {document.id!r}" if document.place else document.id
            self.report.faults.add(BrokenItem(place, str(error)))
            return False
        return True

    def _sample_place(self, number: int) -> int | None:
        """Where on the sheet the document of this number goes: each is as likely to stay as any other."""
        # Reservoir sampling: nobody knows how many documents there are before the last one.
        if number < self.num_samples:
            return number
        place = self._rng.below(number + 1)
        return place if place < self.num_samples else None

    def _opened(self, image: Image, document: Document) -> PILImage.Image | None:
        try:
            self._count_repetition(image)
            opened = image.load()
        except ImageError as error:
            self.report.num_broken_images += 1
            self.report.faults.add(BrokenImage(document.id, str(error), document.place))
            return None
        self.report.shorter_sides[min(opened.size)] += 1
        return opened

    def _count_repetition(self, image: Image):
        """The same bytes under another name; the same file again is no repetition."""
        source = image.source
        if isinstance(source, PILImage.Image):
            return
        name = hash(source if isinstance(source, Path) else image.name)
        data = read_regular_file(source, image.name) if isinstance(source, Path) else source
        key = hashlib.blake2b(data, digest_size=16).digest()
        self.report.num_repeated_images += self._names_by_hash.setdefault(key, name) != name

    def _count_remarks(self, document: Document):
        for remark in document.remarks:
            if (found := self.report.remarks.get(remark)) is not None:
                found.count += 1
            elif len(self.report.remarks) < MAX_KINDS:
                self.report.remarks[remark] = RemarkCount(f"{document.place}: document {document.id!r}")


def _sample(document: Document, opened: Sequence[PILImage.Image | None]) -> Sample:
    waiting = iter(opened)
    parts: list[SampledText | SampledImage] = []
    for is_target, given in ((False, document.parts), (True, document.target)):
        for part in given:
            if isinstance(part, Text):
                parts.append(SampledText(part.text, part.role, is_target))
                continue
            image = next(waiting)
            size = (0, 0) if image is None else image.size
            parts.append(SampledImage(None if image is None else _thumbnail(image), size, is_target))
    return Sample(document.id, tuple(parts))


def _thumbnail(image: PILImage.Image) -> PILImage.Image:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return small
