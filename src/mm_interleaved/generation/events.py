"""What happens while a document is continued. The command line, a server and a studio all consume these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image as PILImage

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import MMInterleavedError


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text; the deltas of a part, joined, are its text."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageStarted:
    """An image has begun."""

    index: int
    """Counted over all images of the document, those of the prompt included."""


@dataclass(frozen=True, slots=True)
class ImagePreview:
    """An image as it is so far."""

    image: PILImage.Image
    step: int
    """Denoising steps done."""


@dataclass(frozen=True, slots=True)
class ImageDone:
    """An image is finished."""

    image: PILImage.Image
    seed: int
    """The seed of its noise."""
    pixel_error: float | None = None
    """How far it is from the exact image of the same noise, see `Image.pixel_error`; if it was measured."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    reason: str
    """`stop`: the model ended the document. `layout`: all parts wanted are there. `length`: the text budget
    or the model's context is used up. `max_images`: the model wants one more image than it may generate.
    """
    document: Document
    """The completed document: the given parts, then the generated ones."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of one document of several that cannot be continued; the others go on."""

    error: MMInterleavedError
    """What `InterleavedGenerator.stream` would have raised."""


Event: TypeAlias = TextDelta | ImageStarted | ImagePreview | ImageDone | Finished | Failed
