"""The one place where the bytes of an image become pixels, and where pixels become a square for the encoder.

Everything that opens an image (documents, training data, server, studio) comes through `open_image`: one
guard, no second path around it. Pillow only, so that the same file gives the same pixels everywhere.
Letters: C channels, H height, W width.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mm_interleaved.errors import ImageError, escape

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP or TIFF"
MAX_PIXELS = 40_000_000
"""Read from the header, before decoding. Pillow's own limit still lets 20 KB become 800 MB of pixels."""
MAX_FILE_BYTES = 128 * 2**20
MAX_ASPECT = 16
"""Longer strips are cut first: scaled up to the encoder's size, 1 x 20000 pixels would need gigabytes."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Orientations of EXIF whose images stand on their side in the file."""

_Result = TypeVar("_Result")

_SUFFIXES = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8", ".jpg"),
    (b"RIFF", ".webp"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
)
_KNOWN_STARTS = (
    (b"\x89PNG", "the beginning of a PNG image"),
    (b"\xff\xd8", "the beginning of a JPEG image"),
    (b"RIFF", "the beginning of a RIFF file (WebP, sound or video)"),
    (b"GIF8", "the beginning of a GIF image"),
    (b"BM", "the beginning of a BMP image"),
    (b"II*\x00", "the beginning of a TIFF image"),
    (b"MM\x00*", "the beginning of a TIFF image"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"PK\x03\x04", "a zip"),
    (b"\x1f\x8b", "gzip data"),
    (b"8BPS", "a Photoshop image"),
    (b"SIMPLE  =", "a FITS image"),
    (b"%!PS", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"version https://git-lfs", "a Git-LFS pointer (the real file was never downloaded)"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML or SVG file"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"{", "JSON or plain text"),
)


def to_png(image: PILImage.Image) -> bytes:
    """An image as the bytes of a PNG file: lossless, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def open_image(
    source: str | Path | bytes | PILImage.Image, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> PILImage.Image:
    """The image as 8-bit RGB, turned as its EXIF orientation says, alpha over white.

    Of an animation or of several pages, the first; the others are never decoded. Colour profiles are ignored:
    pixels are taken as sRGB. 16-bit values are scaled (not clipped) to 8 bits.

    Args:
        source: path of a regular file, bytes of an encoded file (`FORMAT_NAMES`, whatever its name says), or
            an image in memory.
        name: how messages call it; the path otherwise.

    Raises:
        ImageError: missing, not a regular file, another format, damaged, or more than `max_pixels`.
    """
    return _guarded(source, name, max_pixels, _decoded)


def upright_size(source: str | Path | bytes | PILImage.Image, *, name: str | None = None) -> tuple[int, int]:
    """Width and height that `open_image` would give, out of the header. Raises ImageError as it does."""
    return _guarded(source, name, MAX_PIXELS, _upright_size)


def _guarded(
    source: str | Path | bytes | PILImage.Image,
    name: str | None,
    max_pixels: int,
    use: Callable[[PILImage.Image, str], _Result],
) -> _Result:
    if isinstance(source, PILImage.Image):
        return _opened(source, b"", name or "image in memory", max_pixels, use)
    if isinstance(source, bytes):
        name, data = name or "image data", source
    else:
        name = name or str(source)
        data = read_regular_file(Path(source), name)
    if not data:
        raise ImageError(f"image {escape(name)!r}: the file is empty")
    return _opened(io.BytesIO(data), data, name, max_pixels, use)


def _opened(
    source: io.BytesIO | PILImage.Image,
    data: bytes,
    name: str,
    max_pixels: int,
    use: Callable[[PILImage.Image, str], _Result],
) -> _Result:
    """What `use` makes of an image that is not too large, whatever the decoder raises.

    `data` is what a message describes if it is no image.
    """
    try:
        # Warnings are left alone: their filters are those of the whole process, other threads included.
        if isinstance(source, PILImage.Image):
            _check_size(source, name, max_pixels)
            return use(source, name)
        with PILImage.open(source, formats=FORMATS) as image:
            _check_size(image, name, max_pixels)
            return use(image, name)
    except ImageError:
        raise
    except (PILImage.DecompressionBombWarning, PILImage.DecompressionBombError) as error:
        raise ImageError(f"image {escape(name)!r}: more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        found = describe_bytes(data)
        raise ImageError(f"image {escape(name)!r}: found {found}, expected {FORMAT_NAMES}") from error
    except Exception as error:
        # Decoders of damaged files raise nearly anything (struct.error, SyntaxError, MemoryError, ...).
        reason = escape(str(error)) or type(error).__name__
        raise ImageError(f"image {escape(name)!r}: damaged ({reason})") from error


def read_regular_file(path: Path, name: str | None = None, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`; never waits on a pipe. Raises ImageError."""
    name = escape(name or str(path))
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise ImageError(f"image {name!r}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"image {name!r}: cannot be opened ({getattr(error, 'strerror', error)})") from error
    try:
        # Checked on what was opened, so that nothing can be put in its place in between.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"image {name!r}: found a {file_kind(status.st_mode)}, expected a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"image {name!r}: found {status.st_size} bytes, expected at most {max_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    except OSError as error:
        raise ImageError(f"image {name!r}: cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def file_kind(mode: int) -> str:
    """The word for a file that is not a regular one, from its `st_mode`."""
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((word for is_kind, word in kinds if is_kind(mode)), "device")


def image_suffix(data: bytes) -> str | None:
    """What the name of an encoded file should end with, `.png` or the like, by the bytes that it begins with;
    None for what is none of `FORMATS`.
    """
    return next((suffix for start, suffix in _SUFFIXES if data.startswith(start)), None)


def describe_bytes(data: bytes) -> str:
    """What a file that is no image of ours seems to be."""
    start = data[:64].lstrip().lower()
    for known, description in _KNOWN_STARTS:
        if start.startswith(known.lower()):
            return description
    return f"unknown data beginning with {data[:4].hex(' ')}"


def fit_square(image: PILImage.Image, size: int) -> PILImage.Image:
    """The central square of an image at `size` x `size` pixels, by the rule of the released model.

    Halved with a box filter while the shorter side is at least twice the target, then bicubic until the
    shorter side fits, then cropped in the centre.
    """
    image = _without_long_ends(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=PILImage.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resample=PILImage.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True, slots=True)
class SquareCrop:
    """An image as pixels of one fixed square size.

    `released` is the rule of the released model (`fit_square`); `clip` is that of CLIP's own processor, for
    models composed of stock parts.
    """

    size: int
    rule: str = "released"

    def __post_init__(self):
        if self.rule not in ("released", "clip"):
            raise ValueError(f"resize rule: expected 'released' or 'clip', found {self.rule!r}")
        if self.size < 1:
            raise ValueError(f"image size: expected at least 1 pixel, found {self.size}")

    def __call__(self, image: PILImage.Image) -> np.ndarray:
        """(C=3, H=size, W=size) float32 in [0, 1] of an RGB image."""
        if self.rule == "released":
            return to_array(fit_square(image, self.size))
        return self._clip(_without_long_ends(image))

    def _clip(self, image: PILImage.Image) -> np.ndarray:
        from transformers import CLIPImageProcessorPil

        square = {"height": self.size, "width": self.size}
        # Mean and standard deviation are taken off inside the model.
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.size}, crop_size=square, do_normalize=False
        )
        return np.asarray(processor(image, return_tensors="np")["pixel_values"][0], dtype=np.float32)


def to_array(image: PILImage.Image) -> np.ndarray:
    """(C=3, H, W) float32 in [0, 1] of an RGB image."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, found mode {image.mode!r}: open it with open_image")
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)


def _check_size(image: PILImage.Image, name: str, max_pixels: int):
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"image {escape(name)!r}: {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(
            f"image {escape(name)!r}: {width} x {height} pixels, expected at most {max_pixels} in all"
        )


def _decoded(image: PILImage.Image, name: str) -> PILImage.Image:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:
        logger.debug("image %s: EXIF ignored (%s)", escape(name), escape(str(error)))
    return _to_rgb(image, name)


def _upright_size(image: PILImage.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    # Pillow turns the size of a TIFF itself.
    try:
        is_turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _TURNED
    except Exception as error:
        logger.debug("image %s: EXIF ignored (%s)", escape(name), escape(str(error)))
        is_turned = False
    return (height, width) if is_turned else (width, height)


def _to_rgb(image: PILImage.Image, name: str) -> PILImage.Image:
    if image.mode == "F":
        raise ImageError(
            f"image {escape(name)!r}: mode F has no fixed range, expected 8 or 16 bits a channel"
        )
    if image.mode in _SIXTEEN_BIT_MODES:
        return _sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: PILImage.Image) -> PILImage.Image:
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    # 65535 = 255 * 257. Pillow's own convert() clips at 255 instead.
    grey = np.clip((values + 128) // 257, 0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return PILImage.fromarray(grey).convert("RGB")


def _without_long_ends(image: PILImage.Image) -> PILImage.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
