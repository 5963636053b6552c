"""What documents are made of: text and image parts, and how a part is written.

Text is data, whatever it spells; an image is a reference that is opened, through the one guard of
`images.py`, when its pixels are asked for.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image as PILImage

from mm_interleaved.documents.image_sources import image_source
from mm_interleaved.documents.images import open_image, read_regular_file, to_png


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

    def encoded(self) -> bytes:
        """The bytes of its file as they are; of an image in memory, of a PNG. Raises ImageError."""
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, Path):
            return read_regular_file(self.source, self.name)
        return to_png(self.load())


Part: TypeAlias = Text | Image


def part_record(part: Part, image: str = "", *, with_role: bool = True) -> dict[str, Any]:
    """The canonical JSON record of a part.

    Args:
        image: what the record says of an image's place: a path, or a `data:` URL.
    """
    if isinstance(part, Text):
        record: dict[str, Any] = {"type": "text", "text": part.text}
    else:
        record = {"type": "image", "image": image}
    if with_role and part.role is not None:
        record["role"] = part.role
    if part.generated:
        record["generated"] = True
    if part.seed is not None:
        record["seed"] = part.seed
    if isinstance(part, Image) and part.pixel_error is not None:
        record["pixel_error"] = part.pixel_error
    return record
