"""Pairs of a text and an image, and lists of them."""

from __future__ import annotations

from mm_interleaved.documents.document import Part, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_parts import Body, pair_parts, same_length
from mm_interleaved.documents.strict_json import Field


def read_pair(record: Field, folder: ImageStore) -> Body:
    """A text and an image, in the order in which the fields stand."""
    return Body(pair_parts(record, folder))


def read_captions(record: Field, folder: ImageStore) -> Body:
    """`images` and `captions` of equal length, each image beside its caption, in the order of the two
    fields.
    """
    captions = [caption.text() for caption in record["captions"].list()]
    references = record["images"].list()
    same_length(record, "captions", "images")
    names = [name for name in record.object() if name in ("images", "captions")]
    parts: list[Part] = []
    for caption, reference in zip(captions, references, strict=True):
        image = folder.image(reference)
        pair: dict[str, Part | None] = {"images": image, "captions": Text(caption)}
        parts += [part for name in names if (part := pair[name]) is not None]
    return Body(parts)
