"""One image and its caption as a document, the image first or the text first by chance."""

from __future__ import annotations

from mm_interleaved.data.source import ItemRandom
from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.documents.strict_json import Field


def caption_of(field: Field) -> str:
    """A caption; several in a list are joined."""
    if isinstance(field.value, list):
        return " ".join(line.text().strip() for line in field.list())
    return field.text().strip()


def pair_parts(
    image: Image, caption: str, rng: ItemRandom, *, image_first_share: float, lower_case: bool
) -> tuple[Part, ...]:
    """The two parts in the order that chance gives them."""
    text = Text(caption.lower() if lower_case else caption)
    return (image, text) if rng.happens(image_first_share) else (text, image)
