"""Images on their way to the page: as `data:` URLs while they emerge, as files where they stay."""

from __future__ import annotations

import base64
import hashlib
import io

from PIL import Image as PILImage

from mm_interleaved.documents.document import Image, Part

_WITHOUT_LOSS = 256 * 256
"""Pixels up to which an image on its way is sent as PNG; larger ones as JPEG."""
MAX_SIDE = 2048
"""Of an image as the page shows it."""


def data_url(image: PILImage.Image) -> str:
    """An image, small enough to be sent in every few steps."""
    kind = "PNG" if image.width * image.height <= _WITHOUT_LOSS else "JPEG"
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


class Pictures:
    """The images of sessions as PNG files, made anew from pixels: no byte of an upload reaches a browser."""

    def __init__(self, max_bytes: int = 128 * 2**20):
        self._max_bytes = max_bytes
        # The part is kept too, so that no other can have its identity.
        self._known: dict[int, tuple[Part, bytes, str]] = {}

    def png(self, image: Image) -> tuple[bytes, str]:
        """The file, and a short name of its content. Raises ImageError where it cannot be read."""
        found = self._known.get(id(image))
        if found is None:
            shown = image.load()
            shown.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            shown.save(buffer, format="PNG")
            data = buffer.getvalue()
            found = (image, data, hashlib.sha256(data).hexdigest()[:12])
            self._known[id(image)] = found
            self._forget()
        return found[1], found[2]

    def _forget(self) -> None:
        """The oldest go when there are too many."""
        held = sum(len(data) for _, data, _ in self._known.values())
        for key in list(self._known)[:-1]:
            if held <= self._max_bytes:
                break
            held -= len(self._known.pop(key)[1])
