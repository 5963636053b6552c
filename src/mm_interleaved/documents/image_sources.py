"""What callers have an image in, as an `Image` holds it: an image in memory, a path or bytes."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.errors import ImageError, escape

EXPECTED = (
    "a PIL image, a path, the bytes of an encoded file or a file opened for reading them, a data: URL, or an "
    "array of uint8 with shape (height, width), (height, width, 3) or (height, width, 4)"
)
REMOTE_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|file:", re.ASCII | re.IGNORECASE)
_CHANNELS = (1, 3, 4)


def image_source(source: Any) -> PILImage.Image | Path | bytes:
    """The source of an image, whatever Python keeps it in.

    Arrays and open files are read at once, so that what becomes of them later changes no document.

    Args:
        source: what `EXPECTED` says. Of an array: RGB, RGB and alpha, or grey.

    Raises:
        TypeError: something else, or an array of another type or shape.
        ImageError: the address of something remote (never fetched), or a data: URL that is not base64.
    """
    match source:
        case PILImage.Image() | Path() | bytes():
            return source
        case str():
            return _of_text(source)
        case bytearray() | memoryview():
            return bytes(source)
        case io.BytesIO():
            return source.getvalue()
        case np.ndarray():
            return _of_array(source)
        case os.PathLike():
            return Path(os.fsdecode(source))
        case _:
            pass
    if callable(getattr(source, "read", None)):
        data = source.read()
        if isinstance(data, bytes):
            return data
        raise TypeError(f"image: found a file opened as text, expected {EXPECTED}")
    raise TypeError(f"image: found {_described(source)}, expected {EXPECTED}")


def content_of_data_url(url: str) -> str | None:
    """What stands behind `data:...;base64,`; None where that is not how it begins."""
    header, comma, content = url.partition(",")
    return content if comma and header.endswith(";base64") else None


def decoded_base64(content: str) -> bytes:
    """The bytes in base64, between whose characters blanks may stand. Raises ValueError."""
    return base64.b64decode("".join(content.split()), validate=True)


def _of_text(text: str) -> Path | bytes:
    if text.startswith("data:"):
        try:
            content = content_of_data_url(text)
            if content is None:
                raise ValueError("no ;base64, before its content")
            return decoded_base64(content)
        except ValueError as error:
            raise ImageError(f"image: not a data: URL of base64 ({error})") from error
    if REMOTE_ADDRESS.match(text):
        raise ImageError(
            f"image: found the address {escape(text, 60)!r}, expected a local path or a data: URL "
            "(addresses are never fetched)"
        )
    return Path(text)


def _of_array(array: np.ndarray) -> PILImage.Image:
    is_colour = array.ndim == 3 and array.shape[2] in _CHANNELS
    if array.dtype != np.uint8 or not (array.ndim == 2 or is_colour) or 0 in array.shape:
        raise TypeError(f"image: found {_described(array)}, expected {EXPECTED}")
    pixels = array[..., 0] if is_colour and array.shape[2] == 1 else array
    return PILImage.fromarray(np.array(pixels, order="C"))


def _described(source: Any) -> str:
    kind = type(source).__name__
    shape, dtype = getattr(source, "shape", None), getattr(source, "dtype", None)
    return kind if shape is None or dtype is None else f"{kind} of {dtype} with shape {tuple(shape)}"
