"""The only input and the only output: a document of text and image parts.

No tokens, no tensors here. Text is data, whatever it spells; an image is a reference that is opened, through
the one guard of `images.py`, when its pixels are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image as PILImage

from mm_interleaved.documents.image_sources import image_source
from mm_interleaved.documents.images import open_image


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text."""

    text: str
    _: KW_ONLY
    role: str | None = None
    """Who says it (`user`, `assistant`, `system`) in a conversation; None elsewhere."""
    generated: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """One image, by reference.

    `source` is an image in memory, the path of a file (already checked against the allowed root by whoever
    read it), or the bytes of an encoded file. Given may also be what else Python keeps images in, see
    `image_source`.

    Raises TypeError for a `source` of another kind, ImageError for a string that is no path.
    """

    source: PILImage.Image | Path | bytes
    _: KW_ONLY
    role: str | None = None
    generated: bool = False
    seed: int | None = None
    name: str | None = None
    """The image's name where it came from, for messages and pages."""
    pixel_error: float | None = None
    """Of a generated image: mean difference, in levels of 0 to 255, from the one that is generated from the
    same noise with nothing left out; where it was measured (`report_error`).
    """

    def __post_init__(self):
        object.__setattr__(self, "source", image_source(self.source))

    def load(self) -> PILImage.Image:
        """The image as 8-bit RGB, upright. Raises ImageError where it cannot be read."""
        return open_image(self.source, name=self.name)


Part: TypeAlias = Text | Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Parts in reading order, and what is asked about them."""

    id: str = "document"
    parts: tuple[Part, ...] = ()
    """Text and Image, in a list or a tuple."""
    target: tuple[Part, ...] = ()
    """The gold continuation, where one is known."""
    layout: str | None = None
    """Parts wanted in order (`"T I T"`), or `"auto"`."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Generation arguments of this document; they override those of the run."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that belongs to the record, carried along untouched."""
    place: str = field(default="", compare=False, repr=False)
    """Of a document that was read: file and line, for messages; it is not written."""
    remarks: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What of its record was not used, or is doubtful, in a few words each (`documents.record_rules`).
    Not written."""

    def __post_init__(self):
        for name in ("parts", "target"):
            object.__setattr__(self, name, _parts(name, getattr(self, name)))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of the document itself (not of its target), in order."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """The text of the document itself, its parts joined by a space."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))

    def extended(self, *parts: Part) -> Document:
        """The same document with more parts at its end."""
        return replace(self, parts=(*self.parts, *parts))


def _parts(name: str, given: Any) -> tuple[Part, ...]:
    """The parts of a document out of a list, which callers have at hand, or a tuple. Raises TypeError."""
    if isinstance(given, str | Mapping | Text | Image) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a list of Text and Image, found {type(given).__name__}")
    parts = tuple(given)
    for index, part in enumerate(parts):
        if not isinstance(part, Text | Image):
            kind = "Text" if isinstance(part, str) else "Image"
            raise TypeError(
                f"{name}[{index}]: expected Text or Image, found {type(part).__name__}; "
                f"write {kind}(…) around it"
            )
    return parts


ImagePath: TypeAlias = Callable[[Image, int], str]


def part_records(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a canonical record, in order, whether they stand in its `content` or in `messages`."""
    turns = [part for message in record.get("messages", ()) for part in message["content"]]
    return [*record.get("content", ()), *turns]


def document_to_record(document: Document, image_path: ImagePath) -> dict[str, Any]:
    """The canonical JSON record of a document.

    Args:
        image_path: states where the k-th image stands (counted over the parts, then the target): a path
            relative to the file that the record goes into, or a `data:` URL.

    Returns:
        A dict of JSON values. Read back, it gives the same document.
    """
    image_count = 0

    def part_record(part: Part, with_role: bool) -> dict[str, Any]:
        nonlocal image_count
        if isinstance(part, Text):
            record: dict[str, Any] = {"type": "text", "text": part.text}
        else:
            record = {"type": "image", "image": image_path(part, image_count)}
            image_count += 1
        if with_role and part.role is not None:
            record["role"] = part.role
        if part.generated:
            record["generated"] = True
        if part.seed is not None:
            record["seed"] = part.seed
        if isinstance(part, Image) and part.pixel_error is not None:
            record["pixel_error"] = part.pixel_error
        return record

    record: dict[str, Any] = {"id": document.id}
    if document.parts and all(part.role is not None for part in document.parts):
        record["messages"] = [
            {"role": role, "content": [part_record(part, with_role=False) for part in parts]}
            for role, parts in groupby(document.parts, key=lambda part: part.role)
        ]
    else:
        record["content"] = [part_record(part, with_role=True) for part in document.parts]
    if document.target:
        record["target"] = [part_record(part, with_role=True) for part in document.target]
    if document.layout is not None:
        record["layout"] = document.layout
    if document.generation:
        record["generation"] = dict(document.generation)
    if document.meta:
        record["meta"] = dict(document.meta)
    return record


def answer_parts(document: Document) -> tuple[Part, ...]:
    """What was generated: the parts marked so, or all parts where none is marked."""
    return tuple(part for part in document.parts if part.generated) or document.parts
