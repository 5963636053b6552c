"""One document of a request at the engine: admitted, queued, followed to its end or until nobody waits."""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image as PILImage

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import MAX_ASPECT, to_png
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.serving.admission import Admission
from mm_interleaved.serving.client import Client
from mm_interleaved.serving.content import Content
from mm_interleaved.serving.engine_protocol import Engine, Ticket
from mm_interleaved.serving.errors import ApiError, ClientLeftError, api_error, bad_request
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.metrics import Metrics
from mm_interleaved.serving.request_fields import (
    GenerationFields,
    Given,
    preview_steps,
    within_limits,
)
from mm_interleaved.serving.settings import ServerSettings

RATIO = "image_config.aspect_ratio"
SMALL_IMAGE = 128 * 128
"""Pixels up to which an image is encoded on the event loop: it takes under a millisecond."""


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers of requests work with."""

    engine: Engine
    admission: Admission
    content: Content
    files: FilesStore
    metrics: Metrics
    settings: ServerSettings


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as OpenAI counts them: those of images are tokens too."""

    prompt: int
    reused: int
    """Of the prompt, what was remembered."""
    text: int
    images: int

    @property
    def completion(self) -> int:
        """Of the answer."""
        return self.text + self.images

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.reused + other.reused,
            self.text + other.text,
            self.images + other.images,
        )


class Work:
    """One document that the engine has taken."""

    def __init__(self, services: Services, client: Client, ticket: Ticket, document: Document):
        self.services, self.client, self.ticket, self.document = services, client, ticket, document
        self.began = time.monotonic()

    async def events(self) -> AsyncGenerator[Event | None, None]:
        """What happens, `Finished` last; None now and then while nothing does.

        Raises:
            ApiError: it failed, or took too long.
            ClientLeftError: nobody waits; its place is free.
        """
        timing = self.services.metrics.timing(self.began)
        async with aclosing(self._followed()) as events:
            async for event in events:
                if event is not None:
                    timing.saw(event)
                yield event

    async def _followed(self) -> AsyncGenerator[Event | None, None]:
        settings, left = self.services.settings, self.client.left
        deadline = self.began + settings.limits.seconds
        events = aiter(self.ticket)
        upcoming: asyncio.Future[Event] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(_next(events))
                patience = min(settings.keep_alive_seconds, deadline - time.monotonic())
                if patience <= 0:
                    raise _too_slow(settings.limits.seconds)
                await asyncio.wait({upcoming, left}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if left.done():
                    raise ClientLeftError
                if not upcoming.done():
                    yield None
                    continue
                event, upcoming = upcoming.result(), None
                if isinstance(event, Failed):
                    raise self._failure(event.error)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if upcoming is not None:
                upcoming.cancel()
            await self.ticket.cancel()

    def _failure(self, error: MMInterleavedError) -> ApiError:
        found = api_error(error)
        if found.status >= 500:
            self.services.metrics.log_failure(self.client.id, error)
        return found

    async def finished(self) -> list[Event]:
        """All events, when the last one is there."""
        async with aclosing(self.events()) as events:
            return [event async for event in events if event is not None]

    async def leave(self) -> None:
        """Frees its place, if it has one, and watches the client no longer."""
        await self.ticket.cancel()
        self.client.close()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        used = self.ticket.usage
        images = used.images * self.services.admission.image_tokens
        return Usage(used.prompt_tokens, used.reused_tokens, used.text_tokens, images)


async def _next(events: AsyncIterator[Event]) -> Event:
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise ApiError(503, "the server stops", retry_after=10) from None


def _too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"the answer was not ready within {seconds:g} seconds", code="timeout")


async def open_work(
    services: Services, client: Client, document: Document, request: GenerationFields, given: Given
) -> Work:
    """The document at the engine.

    Raises:
        ApiError: 400 for what cannot be done, 429 where the queue is full, 503 where the server stops.
    """
    wanted = dict(given.settings)
    if (seed := wanted.pop("seed", None)) is not None:
        # As a document's own, it is the seed; that of a run is mixed with the document's name.
        document = replace(document, generation={"seed": seed})
    wanted |= _size(services, request)
    streams = bool(getattr(request, "stream", False))
    try:
        settings = services.admission.settings(document, wanted)
        own_pixels = math.prod(services.admission.size_for((1, 1)))
        settings = within_limits(settings, given.params, services.settings.limits, own_pixels)
        every = preview_steps(request, settings.num_inference_steps) if streams else 0
        ticket = await client.wait_for(services.engine.open(document, settings, preview_every=every))
    except (MMInterleavedError, ApiError) as error:
        raise api_error(error, given.params) from error
    return Work(services, client, ticket, document)


def _size(services: Services, request: GenerationFields) -> dict[str, int]:
    """Height and width by the ratio of both, where that is what is asked for."""
    ratio = None if request.image_config is None else request.image_config.aspect_ratio
    if ratio is None:
        return {}
    wide, high = (int(side) for side in ratio.split(":"))
    if not (0 < wide <= MAX_ASPECT * high and 0 < high <= MAX_ASPECT * wide):
        raise bad_request(RATIO, f"found {ratio!r}, expected 1:{MAX_ASPECT} to {MAX_ASPECT}:1")
    height, width = services.admission.size_for((wide, high))
    return {"height": height, "width": width}


def stream_error(work: Work, error: Exception) -> dict[str, Any]:
    """An error that ends a stream which has begun."""
    found = api_error(error)
    if found is not error:
        work.services.metrics.log_failure(work.client.id, error)
    return found.body(work.client.id)


async def left(client: Client, *works: Work | None) -> None:
    """Frees what a request holds that ends before its time."""
    client.close()
    for work in works:
        if work is not None:
            await work.leave()


async def encoded(image: PILImage.Image, kind: str) -> bytes:
    """An image as the bytes of a file: png, jpeg or webp."""
    if image.width * image.height <= SMALL_IMAGE:
        return _encoded(image, kind)
    return await asyncio.to_thread(_encoded, image, kind)


def _encoded(image: PILImage.Image, kind: str) -> bytes:
    if kind == "png":
        return to_png(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), quality=95)
    return buffer.getvalue()
