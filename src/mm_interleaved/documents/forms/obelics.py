"""OBELICS: a web page as two lists, of texts and of images."""

from __future__ import annotations

from collections.abc import Iterator

from mm_interleaved.documents.document import Part, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_parts import Body, same_length
from mm_interleaved.documents.strict_json import Field, FieldError


def read_obelics(record: Field, folder: ImageStore) -> Body:
    """Two lists of equal length; at each index either a text or an image."""
    parts: list[Part] = []
    for text, image in obelics_pairs(record):
        if text.value is not None:
            parts.append(Text(text.text()))
        else:
            reference = folder.image(image)
            parts += [] if reference is None else [reference]
    return Body(parts)


def obelics_pairs(record: Field) -> Iterator[tuple[Field, Field]]:
    """Text and image of each index, one of which is null. Raises FieldError."""
    same_length(record, "texts", "images")
    for text, image in zip(record["texts"].list(), record["images"].list(), strict=True):
        if (text.value is None) == (image.value is None):
            found = "neither" if text.value is None else "both"
            raise FieldError(
                text.path, f"found {found} a text and an image at one index, expected one of them"
            )
        yield text, image
