"""What an inspection of a source found: counts, what is broken, and samples for the contact sheet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image as PILImage

from mm_interleaved.data.distributions import summary
from mm_interleaved.data.source import BrokenItem

MAX_KINDS = 1000
"""Of faults and of remarks; later kinds are not kept."""
_CHANGING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""What differs between equal faults: names, indices, numbers."""


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
        elif len(self._by_kind) < MAX_KINDS:
            self._by_kind[kind] = Fault(broken)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._by_kind.values())


@dataclass(slots=True)
class RemarkCount:
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
    """An image on the contact sheet: a thumbnail, None where the image cannot be opened."""

    thumbnail: PILImage.Image | None
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
    """What an inspection of a source found; grows while it goes on."""

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
    remarks: dict[str, RemarkCount] = field(default_factory=dict)
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
