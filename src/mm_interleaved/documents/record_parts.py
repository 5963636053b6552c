"""The parts of a record: texts, images by whatever field names them, and images beside the texts.

What several forms of record share; each form's own reader stands in `forms/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.parts import Image, Part, Text
from mm_interleaved.documents.placeholders import PartOrSlot, Slot, filled, images_first, with_slots
from mm_interleaved.documents.strict_json import Field, FieldError

MAX_IMAGES = 100_000
"""Of one record."""
IMAGES_BESIDE = ("images", "image")
"""Fields that name images beside the texts of a record."""
_IMAGE_KINDS = ("image", "image_url", "input_image")
_PAIRED = ("text", "caption", "image", "file_name")


@dataclass(frozen=True, slots=True)
class Body:
    """What a reader finds in a record."""

    parts: list[Part]
    target: list[Part] = field(default_factory=list)
    layout: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def content_parts(content: Field, folder: ImageStore) -> list[Part]:
    """The parts of a text, or of a list of parts that all name their images."""
    return without_slots(content_pieces(content, folder))


def content_pieces(content: Field, folder: ImageStore, role: str | None = None) -> list[PartOrSlot]:
    """The parts of a text, or of a list of parts; images that are named beside the texts as slots."""
    if isinstance(content.value, str):
        return [Text(content.text(), role=role)]
    return [piece for item in content.list() for piece in _part(item, folder, role)]


def _part(item: Field, folder: ImageStore, role: str | None) -> Sequence[PartOrSlot]:
    if isinstance(item.value, str):
        return [Text(item.text(), role=role)]
    own_role = item.get("role")
    role = role if own_role is None else own_role.text()
    kind = None if "type" not in item else item["type"].text()
    found: list[Part]
    if kind is None:
        found = pair_parts(item, folder, role)
    elif kind in _IMAGE_KINDS and _reference(item) is None and item.get("base64") is None:
        index = item.get("index")
        number = None if index is None else index.integer(0, MAX_IMAGES)
        instead = "found null, expected a string" if "image" in item else "missing"
        return [Slot(role, number, item.path, instead)]
    elif kind in ("text", "input_text", "output_text"):
        found = [Text(item["text"].text(), role=role)]
    elif kind in _IMAGE_KINDS:
        image = _image(item, folder, role)
        found = [] if image is None else [image]
    else:
        item["type"].wrong('"text" or "image"')
    return _with_provenance(found, item)


def _with_provenance(parts: list[Part], item: Field) -> list[Part]:
    """The parts with what their record states of how they were generated."""
    generated, seed = item.get("generated"), item.get("seed")
    if generated is None and seed is None:
        return parts
    parts = [
        replace(
            part,
            generated=generated is not None and generated.boolean(),
            seed=None if seed is None else seed.integer(0, 2**63 - 1),
        )
        for part in parts
    ]
    error = item.get("pixel_error")
    if error is None:
        return parts
    levels = error.value
    if isinstance(levels, bool) or not isinstance(levels, int | float) or not 0 <= levels <= 255:
        error.wrong("a number from 0 to 255")
    return [replace(part, pixel_error=levels) if isinstance(part, Image) else part for part in parts]


def _image(item: Field, folder: ImageStore, role: str | None) -> Image | None:
    """The image of a part: by `image`, `url`, `path`, `base64`, or OpenAI's `image_url`."""
    if (encoded := item.get("base64")) is not None:
        return folder.encoded(encoded, role)
    return named_image(_reference(item) or item["image"], folder, role)


def _reference(item: Field) -> Field | None:
    """The name of a part's image; None where it has none."""
    names = ("image", "path", "url", "image_url")
    return next((found for name in names if (found := item.get(name)) is not None), None)


def named_image(reference: Field, folder: ImageStore, role: str | None = None) -> Image | None:
    """The image that a string names, or an object with `path`, `url`, `image` or `base64`."""
    if not isinstance(reference.value, dict):
        return folder.image(reference, role)
    return _image(reference, folder, role)


def pair_parts(item: Field, folder: ImageStore, role: str | None = None) -> list[Part]:
    """A text and an image, in the order in which the fields stand; either may be missing or null."""
    parts: list[Part] = []
    for name in item.object():
        value = item.get(name) if name in _PAIRED else None
        if value is None:
            continue
        if name in ("text", "caption"):
            is_list = isinstance(value.value, list)
            text = " ".join(line.text() for line in value.list()) if is_list else value.text()
            parts.append(Text(text, role=role))
        else:
            image = named_image(value, folder, role)
            parts += [] if image is None else [image]
    if not parts and not folder.skip_missing:
        item.wrong("a part with a type, or a pair of text and image")
    return parts


def named_images(references: Field | None, folder: ImageStore) -> list[Image | None]:
    """The images of a list of names, or of one; None is an image left out because it is missing."""
    if references is None:
        return []
    if isinstance(references.value, str | dict):
        return [named_image(references, folder)]
    return [named_image(reference, folder) for reference in references.list()]


def joined(record: Field, pieces: list[PartOrSlot], folder: ImageStore) -> list[Part]:
    """The pieces with the images that the record names beside them.

    They stand at the parts `{"type": "image"}` that name none, or at the placeholders in the texts if these
    are as many; before the first text that is no system sentence if there is neither.
    """
    given = next((found for name in IMAGES_BESIDE if (found := record.get(name)) is not None), None)
    images = named_images(given, folder)
    slots = [piece for piece in pieces if isinstance(piece, Slot)]
    if given is None:
        return without_slots(pieces)
    # Some exports name each image twice: in its place and in a list of all.
    if _are_named_in(pieces, images):
        return without_slots(pieces)
    _check_indices(slots, len(images))
    placed = with_slots(pieces, len(images))
    if placed is not None:
        return filled(placed, images)
    if not slots and not any(isinstance(piece, Image) for piece in pieces):
        return images_first(pieces, images)
    if not slots:
        raise FieldError(
            given.path, f"found {len(images)} images beside others in the texts, expected a place of each"
        )
    path = slots[-1].path
    raise FieldError(path, f"found {len(slots)} parts for images, expected {len(images)} as in {given.path}")


def _are_named_in(pieces: Sequence[PartOrSlot], images: Sequence[Image | None]) -> bool:
    """Whether the images beside the texts are those that the texts name themselves, repeated."""
    named = [piece.source for piece in pieces if isinstance(piece, Image)]
    return bool(named) and named == [image.source for image in images if image is not None]


def without_slots(pieces: Sequence[PartOrSlot]) -> list[Part]:
    """The pieces as parts. Raises FieldError where an image has no source."""
    for piece in pieces:
        if isinstance(piece, Slot):
            raise FieldError(f"{piece.path}.image", f"{piece.found}; no image is named beside the texts")
    return [piece for piece in pieces if not isinstance(piece, Slot)]


def _check_indices(slots: Sequence[Slot], num_images: int):
    """Refuses numbers of images that leave one out, or mean none."""
    numbers = sorted(slot.index for slot in slots if slot.index is not None)
    if numbers and numbers != list(range(num_images)):
        raise FieldError(
            slots[-1].path, f"found the indices {numbers}, expected each below {num_images} once"
        )


def same_length(record: Field, first: str, second: str):
    """Refuses two lists of a record that differ in length."""
    lengths = len(record[first].list()), len(record[second].list())
    if lengths[0] != lengths[1]:
        raise FieldError(
            record[first].path, f"found {lengths[0]} items, expected {lengths[1]} as in {second}"
        )
