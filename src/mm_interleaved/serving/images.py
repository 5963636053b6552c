"""POST /v1/images/generations."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial, reduce
from operator import add
from typing import Any

from PIL import Image as PILImage
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.generation.events import ImageDone, ImagePreview
from mm_interleaved.serving.client import KEEP_ALIVE, Client, EventStream, all_of, event
from mm_interleaved.serving.errors import ApiError, ClientLeftError, bad_request
from mm_interleaved.serving.images_request import ImagesRequest
from mm_interleaved.serving.names import check_model, files_url
from mm_interleaved.serving.request_body import read_body
from mm_interleaved.serving.request_fields import Given, given_settings
from mm_interleaved.serving.work import Services, Usage, Work, encoded, left, open_work, stream_error


async def generate_images(services: Services, request: Request) -> Response:
    """Images of one text, at once or as a stream."""
    asked = await read_body(request, ImagesRequest)
    check_model(services.settings, asked.model)
    given = given_settings(asked, services.settings.limits)
    count, limit = asked.n or 1, services.settings.limits.new_images
    if count * (asked.num_candidates or 1) > limit:
        raise bad_request(
            "n", f"found {count}, expected at most {limit} images in all (a limit of this server)"
        )
    if asked.response_format == "url" and (asked.stream or (asked.output_format or "png") != "png"):
        raise bad_request(
            "response_format", "found 'url', expected b64_json for streams and other files than PNG"
        )
    given.take("layout", "I", "prompt")
    client = Client(request)
    works: list[Work] = []
    try:
        for number in range(count):
            works.append(
                await open_work(services, client, _document(client, asked, number), asked, _of(given, number))
            )
        if asked.stream:
            return EventStream(_stream(works, asked), partial(left, client, *works))
        record = await _whole(works, asked, files_url(services.settings, request))
    except BaseException:
        await left(client, *works)
        raise
    await left(client, *works)
    return JSONResponse(record)


def _document(client: Client, asked: ImagesRequest, number: int) -> Document:
    # Models are trained on images of captions: no roles.
    return Document(id=f"{client.id}-{number}", parts=(Text(asked.prompt),))


def _of(given: Given, number: int) -> Given:
    """The settings of one of several images: the seeds follow each other."""
    own = Given()
    own.settings, own.params = dict(given.settings), given.params
    if "seed" in own.settings:
        own.settings["seed"] = (own.settings["seed"] + number) % 2**63
    return own


async def _whole(works: Sequence[Work], asked: ImagesRequest, address: str) -> dict[str, Any]:
    images = await all_of([_image(work) for work in works])
    kind = asked.output_format or "png"
    data = []
    for done in images:
        content = await encoded(done.image, kind)
        if asked.response_format == "url":
            name = works[0].services.files.add(content)
            data.append({"url": f"{address}/{name}.png", "seed": done.seed})
        else:
            data.append({"b64_json": base64.b64encode(content).decode(), "seed": done.seed})
    usage = reduce(add, (work.usage for work in works))
    return {
        **_head(images[0].image, kind),
        "created": int(time.time()),
        "data": data,
        "usage": usage_record(usage),
    }


async def _image(work: Work) -> ImageDone:
    found = [each for each in await work.finished() if isinstance(each, ImageDone)]
    if not found:
        raise ApiError(
            400,
            "prompt: too long, there is no room for an image behind it",
            param="prompt",
            code="context_length_exceeded",
        )
    return found[0]


async def _stream(works: Sequence[Work], asked: ImagesRequest) -> AsyncGenerator[bytes, None]:
    """One image after the other: OpenAI's events do not say which of several they are of."""
    kind = asked.output_format or "png"
    try:
        for work in works:
            shown = 0
            async with aclosing(work.events()) as events:
                async for each in events:
                    match each:
                        case None:
                            yield KEEP_ALIVE
                        case ImagePreview(image=image) if shown < (asked.partial_images or 0):
                            record = await _record(image, kind, "image_generation.partial_image")
                            yield event({**record, "partial_image_index": shown}, record["type"])
                            shown += 1
                        case ImageDone(image=image, seed=seed):
                            record = await _record(image, kind, "image_generation.completed")
                            record |= {"usage": usage_record(work.usage), "seed": seed}
                            yield event(record, record["type"])
                        case _:
                            pass
    except ClientLeftError:
        raise
    except Exception as error:
        yield event({"type": "error", **stream_error(works[0], error)}, "error")


async def _record(image: PILImage.Image, kind: str, name: str) -> dict[str, Any]:
    content = base64.b64encode(await encoded(image, kind)).decode()
    return {"type": name, "b64_json": content, "created_at": int(time.time()), **_head(image, kind)}


def _head(image: PILImage.Image, kind: str) -> dict[str, Any]:
    size = f"{image.width}x{image.height}"
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": kind}


def usage_record(usage: Usage) -> dict[str, Any]:
    """As images and responses tell it."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {
            "text_tokens": usage.prompt,
            "image_tokens": 0,
            "cached_tokens": usage.reused,
        },
        "output_tokens": usage.completion,
        "output_tokens_details": {
            "text_tokens": usage.text,
            "image_tokens": usage.images,
            "reasoning_tokens": 0,
        },
        "total_tokens": usage.prompt + usage.completion,
    }
