"""A look through a source: what is there, what is broken, how long, how large, and what it looks like."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image as PILImage

from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, Shard, Source, items_of
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import read_regular_file
from mm_interleaved.errors import ImageError, InputError
from mm_interleaved.seeded_random import SeededRandom

NUM_SAMPLES = 48
"""Documents on the contact sheet."""
_THUMBNAIL_SIDE = 160
_SAMPLE_DOMAIN = 31
_MAX_KINDS = 1000
_CHANGING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""What differs between equal faults: names, indices, numbers."""

CountTokens = Callable[[Document], int]


@dataclass(frozen=True, slots=True)
class BrokenImage:
    """An image that cannot be opened."""

    document_id: str
    reason: str
    place: str = ""
    """File, and line or entry in it, of the document."""

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{place}document {self.document_id!r}: {self.reason}"


@dataclass(slots=True)
class Fault:
    """Equal faults: the first of them, and how many there are."""

    first: BrokenItem | BrokenImage
    count: int = 1

    def __str__(self) -> str:
        return str(self.first) if self.count == 1 else f"{self.first} ({self.count:,} times)"


class Faults:
    """What is broken, equal faults together: those that differ in names and numbers only."""

    def __init__(self):
        self._by_kind: dict[str, Fault] = {}

    def add(self, broken: BrokenItem | BrokenImage):
        """Counts one; of more than a thousand kinds, the later ones are not kept."""
        field = broken.field if isinstance(broken, BrokenItem) else None
        kind = _CHANGING.sub("?", f"{type(broken).__name__} {field} {broken.reason}")
        if (fault := self._by_kind.get(kind)) is not None:
            fault.count += 1
        elif len(self._by_kind) < _MAX_KINDS:
            self._by_kind[kind] = Fault(broken)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._by_kind.values())


@dataclass(slots=True)
class Remarked:
    """A remark that documents carry: where the first one stands, and how many there are."""

    first: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class SampledText:
    """A text of a document on the contact sheet."""

    text: str
    role: str | None
    is_target: bool


@dataclass(frozen=True, slots=True)
class SampledImage:
    """A small picture of an image, None where it cannot be opened."""

    picture: PILImage.Image | None
    size: tuple[int, int]
    """Width and height of the image itself."""
    is_target: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A document on the contact sheet."""

    id: str
    parts: tuple[SampledText | SampledImage, ...]


@dataclass(slots=True)
class Report:
    """What a look through a source found; grows while it is looked through."""

    name: str
    num_documents: int = 0
    num_texts: int = 0
    num_images: int = 0
    num_broken: int = 0
    num_broken_images: int = 0
    num_missing_images: int = 0
    """Images left out because their files are not there."""
    num_repeated_images: int = 0
    """Images whose bytes were there before under another name."""
    faults: Faults = field(default_factory=Faults)
    remarks: dict[str, Remarked] = field(default_factory=dict)
    """What documents carry with them that was not used or is doubtful, see `documents.record_rules`."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Items left out on purpose, by rule."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Documents by their number of tokens."""
    images_a_document: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    """Documents by the characters of their text."""
    shorter_sides: Counter[int] = field(default_factory=Counter)
    """Images by the pixels of their shorter side."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def broken(self) -> list[BrokenItem | BrokenImage]:
        """The first of each kind of fault."""
        return [fault.first for fault in self.faults]

    def to_json(self) -> dict[str, object]:
        """The figures, for programs."""
        return {
            "name": self.name,
            "documents": self.num_documents,
            "texts": self.num_texts,
            "images": self.num_images,
            "broken_items": self.num_broken,
            "broken_images": self.num_broken_images,
            "missing_images": self.num_missing_images,
            "repeated_images": self.num_repeated_images,
            "filtered": dict(sorted(self.filtered.items())),
            "tokens": summary(self.tokens),
            "images_a_document": summary(self.images_a_document),
            "characters": summary(self.characters),
            "shorter_sides": summary(self.shorter_sides),
            "remarks": {
                remark: {"count": found.count, "first": found.first} for remark, found in self.remarks.items()
            },
            "broken": [str(item) for item in self.broken],
            "faults": [{"first": str(fault.first), "count": fault.count} for fault in self.faults],
        }


class Look:
    """Goes through a source and keeps the report.

    Args:
        name: how the report calls the source.
        count_tokens: tokens of a document, its target included; None leaves them out.
        opens_images: open each image; otherwise only those on the contact sheet.
        max_items: items to look at, of each shard; None looks at all.
        num_samples: documents for the contact sheet, chosen evenly by chance, the same in each look.
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

    def through(self, source: Source, shards: Sequence[Shard]) -> Iterator[Item]:
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
        self._note(document)
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
            pictures = [self._opened(part, document) for part in images]
        else:
            pictures = []
        if place is not None:
            sample = _sample(document, pictures)
            report.samples[place : place + 1] = [sample]

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
        if number < self.num_samples:
            return number
        place = self._rng.below(number + 1)
        return place if place < self.num_samples else None

    def _opened(self, image: Image, document: Document) -> PILImage.Image | None:
        try:
            self._count_repetition(image)
            picture = image.load()
        except ImageError as error:
            self.report.num_broken_images += 1
            self.report.faults.add(BrokenImage(document.id, str(error), document.place))
            return None
        self.report.shorter_sides[min(picture.size)] += 1
        return picture

    def _count_repetition(self, image: Image):
        """The same bytes under another name; the same file again is no repetition."""
        source = image.source
        if isinstance(source, PILImage.Image):
            return
        name = hash(source if isinstance(source, Path) else image.name)
        data = read_regular_file(source, image.name) if isinstance(source, Path) else source
        key = hashlib.blake2b(data, digest_size=16).digest()
        self.report.num_repeated_images += self._names_by_hash.setdefault(key, name) != name

    def _note(self, document: Document):
        for remark in document.remarks:
            if (found := self.report.remarks.get(remark)) is not None:
                found.count += 1
            elif len(self.report.remarks) < _MAX_KINDS:
                self.report.remarks[remark] = Remarked(f"{document.place}: document {document.id!r}")


def _sample(document: Document, pictures: Sequence[PILImage.Image | None]) -> Sample:
    waiting = iter(pictures)
    parts: list[SampledText | SampledImage] = []
    for is_target, given in ((False, document.parts), (True, document.target)):
        for part in given:
            if isinstance(part, Text):
                parts.append(SampledText(part.text, part.role, is_target))
                continue
            picture = next(waiting)
            size = (0, 0) if picture is None else picture.size
            parts.append(SampledImage(None if picture is None else _thumbnail(picture), size, is_target))
    return Sample(document.id, tuple(parts))


def _thumbnail(picture: PILImage.Image) -> PILImage.Image:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return small


def summary(counts: Counter[int]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and largest of counted numbers; empty where there are none."""
    total = counts.total()
    if not total:
        return {}
    return {
        "min": min(counts),
        "median": _percentile(counts, 0.5),
        "mean": sum(value * count for value, count in counts.items()) / total,
        "p95": _percentile(counts, 0.95),
        "max": max(counts),
    }


def _percentile(counts: Counter[int], share: float) -> int:
    """The smallest number that at least this share of all is not above."""
    wanted, seen = math.ceil(share * counts.total()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    raise AssertionError("the last number is above none")


def histogram(counts: Counter[int], max_bars: int = 16) -> list[tuple[int, int, int]]:
    """(first, last, how many) of bars of equal width that cover all counted numbers."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = _round_up((high - low + 1) / max_bars)
    first = low // width * width
    bars = Counter((value - first) // width for value in counts.elements()) if width > 1 else None
    if bars is None:
        return [(value, value, counts[value]) for value in range(low, high + 1)]
    return [
        (first + bar * width, first + (bar + 1) * width - 1, bars[bar])
        for bar in range((high - first) // width + 1)
    ]


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10
