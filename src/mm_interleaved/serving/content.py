"""Messages of requests as the parts of a document, their images checked.

Order: all counts, then the headers of all images, then their pixels, so that what is refused costs nothing.
Images stay bytes: what waits in the queue is no larger than what was sent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_sources import content_of_data_url, decoded_base64
from mm_interleaved.documents.images import open_image, upright_size
from mm_interleaved.errors import ImageError, escape
from mm_interleaved.serving.client import all_of
from mm_interleaved.serving.errors import ApiError, bad_request
from mm_interleaved.serving.files_store import NAME, FilesStore
from mm_interleaved.serving.remote_images import RemoteImages
from mm_interleaved.serving.settings import Limits, ServerSettings

AT_ONCE = 2
"""Images that are decoded at the same time, over all requests: each may be 160 MB of pixels."""
_OWN_IMAGE = re.compile(rf"!\[[^\[\]\n]{{0,200}}\]\((https?://[^\s()]+/files/{NAME}\.png)\)")
"""Linear in the length of any text: no part of it can be matched by two repetitions."""


@dataclass(frozen=True, slots=True)
class GivenText:
    """A text of a request."""

    text: str
    role: str
    param: str
    """Where in the request it stands."""


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An image of a request by its address."""

    url: str
    role: str
    param: str
    """Where in the request it stands."""


Given = GivenText | GivenImage
Result = TypeVar("Result")


class Content:
    """Makes documents of what requests give.

    Args:
        files: the server's own images, which clients may send back by their addresses.
    """

    def __init__(self, settings: ServerSettings, files: FilesStore, remote: RemoteImages):
        self._limits, self._files, self._remote = settings.limits, files, remote
        self._decoding = asyncio.Semaphore(AT_ONCE)

    async def document(self, id: str, given: Sequence[Given], *, roles: bool, param: str) -> Document:
        """A document of texts and images in their order.

        Args:
            roles: whether they are the turns of a conversation.
            param: the field that holds all of it.

        Raises:
            ApiError: too much of something, or an image that cannot be had or read.
        """
        # Before a text is searched, and once more with what was found in it.
        check_counts(given, self._limits, param)
        given = [part for each in given for part in self._with_own_images(each)]
        check_counts(given, self._limits, param)
        images = [each for each in given if isinstance(each, GivenImage)]
        sources = await all_of([self._source(each) for each in images])
        if images:
            async with self._decoding:
                await asyncio.to_thread(_check_images, images, sources, self._limits, param)
        left = iter(sources)
        parts: list[Part] = []
        for each in given:
            if isinstance(each, GivenImage):
                parts.append(Image(next(left), role=each.role))
            elif each.text:
                parts.append(Text(each.text, role=each.role))
        if not roles:
            parts = [replace(part, role=None) for part in parts]
        return Document(id=id, parts=tuple(parts))

    def _with_own_images(self, given: Given) -> Iterator[Given]:
        """What the assistant said, with the images that its Markdown shows, as long as they are kept; the
        blank lines around them are ours, see `answers`.
        """
        if not isinstance(given, GivenText) or given.role != "assistant":
            yield given
            return
        left = given.text
        for match in _OWN_IMAGE.finditer(given.text):
            if self._files.named_by(match[1]) is not None:
                before = given.text[len(given.text) - len(left) : match.start()]
                yield replace(given, text=before.rstrip())
                yield GivenImage(match[1], given.role, given.param)
                left = given.text[match.end() :].lstrip()
        yield replace(given, text=left)

    async def _source(self, image: GivenImage) -> bytes:
        url = image.url
        if url.startswith("data:"):
            return _of_data_url(url, image.param)
        own = self._files.named_by(url)
        return await self._remote.fetch(url, image.param) if own is None else own


def check_counts(given: Sequence[Given], limits: Limits, param: str) -> None:
    """Refuses too many images or too long texts before anything is decoded."""
    images = [each for each in given if isinstance(each, GivenImage)]
    if len(images) > limits.images:
        over = images[limits.images]
        raise ApiError(
            400,
            f"{over.param}: found {len(images)} images, expected at most {limits.images} in a request",
            param=over.param,
            code="too_many_images",
        )
    length = sum(len(each.text) for each in given if isinstance(each, GivenText))
    if length > limits.characters:
        raise ApiError(
            400,
            f"{param}: found {length} characters of text, expected at most {limits.characters}",
            param=param,
            code="string_above_max_length",
        )


def _of_data_url(url: str, param: str) -> bytes:
    content = content_of_data_url(url)
    if content is None:
        found = escape(url, 40)
        raise bad_request(param, f"found {found!r}, expected data:image/png;base64,... or the like")
    try:
        return decoded_base64(content)
    except ValueError as error:
        raise bad_request(param, f"not base64 ({escape(str(error))})") from error


def _check_images(images: Sequence[GivenImage], sources: Sequence[bytes], limits: Limits, param: str) -> None:
    """Reads the headers of all, then each whole. Raises ApiError."""
    total = 0
    for image, source in zip(images, sources, strict=True):
        width, height = _read(image, source, upright_size)
        total += width * height
        if total > limits.pixels:
            raise ApiError(
                400,
                f"{image.param}: found {total} pixels in the images up to this one, expected at most "
                f"{limits.pixels} in a request",
                param=image.param,
                code="too_many_pixels",
            )
    for image, source in zip(images, sources, strict=True):
        _read(image, source, open_image)


def _read(image: GivenImage, source: bytes, read: Callable[..., Result]) -> Result:
    try:
        return read(source, name="of the request")
    except ImageError as error:
        raise ApiError(400, f"{image.param}: {error}", param=image.param, code="invalid_image") from error
