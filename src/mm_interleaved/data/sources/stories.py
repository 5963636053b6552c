"""What all illustrated stories share: panels of a caption and an image, and where the given part ends."""

from __future__ import annotations

from collections.abc import Sequence

from mm_interleaved.data.source import layout_of
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.strict_json import FieldError


def story_document(name: str, panels: Sequence[tuple[str, Image]], num_given: int, path: str) -> Document:
    """A story, its end as the target.

    Args:
        panels: caption and image, in order; each caption stands before its image.
        num_given: parts that are given; a negative number counts from the end (-1: all but the last image),
            0 gives everything and leaves no target.
        path: the story's field, for messages.
    """
    parts: list[Part] = [part for caption, image in panels for part in (Text(caption), image)]
    if not -len(parts) < num_given < len(parts):
        raise FieldError(path, f"found {len(parts)} parts, of which {num_given} cannot be given")
    end = num_given or len(parts)
    target = tuple(parts[end:])
    return Document(id=name, parts=tuple(parts[:end]), target=target, layout=layout_of(target))
