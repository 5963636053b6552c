"""What the documents of all tasks have in common: a hole, the scenes of all images, and who is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_interleaved.documents.document import Document, Image, Part
from mm_interleaved.storyworld.world import is_held_out


def document_with_hole(
    parts: Sequence[Part], target: Sequence[Part], scenes: Sequence[Mapping[str, Any]], **more: Any
) -> Document:
    """A document without a name yet.

    Args:
        target: what stands in the hole; its kinds of parts are the layout.
        scenes: the records of all images' scenes, those of the hole last.
        more: for its `meta`, beside the scenes.
    """
    return Document(
        id="",
        parts=tuple(parts),
        target=tuple(target),
        layout=" ".join("I" if isinstance(part, Image) else "T" for part in target),
        meta={"scenes": list(scenes), **more},
    )


def shows_held_out(scenes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether somebody stands in one of the scenes whom training never shows."""
    return any(
        is_held_out(figure["species"], figure["body_colour"])
        for scene in scenes
        for figure in scene["figures"]
    )
