"""POST /v1/responses: the ordered shape of OpenAI's own, a message for each text, a call for each image."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Finished
from mm_interleaved.serving.client import KEEP_ALIVE, Client, EventStream, event
from mm_interleaved.serving.content import Given, GivenImage, GivenText
from mm_interleaved.serving.conversation import ROLES
from mm_interleaved.serving.errors import ClientLeftError, bad_request
from mm_interleaved.serving.images import usage_record
from mm_interleaved.serving.names import check_model, wants_document
from mm_interleaved.serving.request_body import read_body
from mm_interleaved.serving.request_fields import given_settings
from mm_interleaved.serving.response_items import ResponseItems
from mm_interleaved.serving.responses_request import (
    ImageTool,
    InputCall,
    InputImage,
    InputMessage,
    ResponsesRequest,
    ToolChoice,
)
from mm_interleaved.serving.work import Services, Work, left, open_work, stream_error


async def create_response(services: Services, request: Request) -> Response:
    """Continues a list of items, at once or as a stream."""
    asked = with_tool(await read_body(request, ResponsesRequest))
    check_model(services.settings, asked.model)
    limits = services.settings.limits
    given = given_settings(asked, limits)
    if isinstance(asked.input, list) and len(asked.input) > limits.messages:
        raise bad_request("input", f"found {len(asked.input)} items, expected at most {limits.messages}")
    client = Client(request)
    work = None
    try:
        document = await client.wait_for(
            _document(services, client, asked, is_plain=wants_document(asked, given.settings))
        )
        work = await open_work(services, client, document, asked, given)
        head = _head(client, asked, services.settings.model)
        items = ResponseItems(client.id, asked.output_format or "png", asked.partial_images)
        if asked.stream:
            return EventStream(_stream(work, items, head), work.leave)
        record = await _whole(work, items, head)
    except BaseException:
        await left(client, work)
        raise
    await work.leave()
    return JSONResponse(record)


async def _whole(work: Work, items: ResponseItems, head: dict[str, Any]) -> dict[str, Any]:
    events = await work.finished()
    for each in events:
        async for _ in items.take(each):
            pass
    for _ in items.close_text():
        pass
    finished = events[-1]
    assert isinstance(finished, Finished), "a stream ends with it"
    return _completed(head, items, work, finished)


async def _document(
    services: Services, client: Client, asked: ResponsesRequest, *, is_plain: bool
) -> Document:
    return await services.content.document(
        client.id, list(given_by(asked)), roles=not is_plain, param="input"
    )


def with_tool(asked: ResponsesRequest) -> ResponsesRequest:
    """The request with what its tool says at the top level. Raises ApiError."""
    tool = next(iter(asked.tools or ()), ImageTool(type="image_generation"))
    for name in ("size", "partial_images", "output_format"):
        own, of_tool = getattr(asked, name), getattr(tool, name)
        if of_tool is not None and own is not None and own != of_tool:
            raise bad_request(f"tools.0.{name}", f"found {of_tool!r} beside {own!r}, expected one of them")
        if of_tool is not None:
            asked = asked.model_copy(update={name: of_tool})
    wants_image = isinstance(asked.tool_choice, ToolChoice) or asked.tool_choice == "required"
    if asked.tool_choice == "none":
        asked = asked.model_copy(update={"modalities": ["text"]})
    elif wants_image and asked.layout is None:
        asked = asked.model_copy(update={"modalities": ["image"]})
    return asked


def given_by(asked: ResponsesRequest) -> Iterator[Given]:
    """Texts and images of the input, in order."""
    if asked.instructions:
        yield GivenText(asked.instructions, "system", "instructions")
    if isinstance(asked.input, str):
        yield GivenText(asked.input, "user", "input")
        return
    for number, item in enumerate(asked.input):
        if isinstance(item, InputCall):
            url = f"data:image/{item.output_format or 'png'};base64,{item.result or ''}"
            yield GivenImage(url, "assistant", f"input.{number}.result")
        else:
            yield from _of_message(item, f"input.{number}.content")


def _of_message(message: InputMessage, place: str) -> Iterator[Given]:
    role = ROLES.get(message.role, message.role)
    if isinstance(message.content, str):
        yield GivenText(message.content, role, place)
        return
    for index, part in enumerate(message.content):
        if isinstance(part, InputImage):
            yield GivenImage(part.image_url, role, f"{place}.{index}.image_url")
        else:
            yield GivenText(part.text, role, f"{place}.{index}.text")


async def _stream(work: Work, items: ResponseItems, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    number = 0

    def numbered(record: dict[str, Any]) -> bytes:
        nonlocal number
        number += 1
        return event({**record, "sequence_number": number - 1}, record["type"])

    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    try:
        yield numbered({"type": "response.created", "response": begun})
        yield numbered({"type": "response.in_progress", "response": begun})
        async with aclosing(work.events()) as events:
            async for each in events:
                if each is None:
                    yield KEEP_ALIVE
                    continue
                async for record in items.take(each):
                    yield numbered(record)
                if isinstance(each, Finished):
                    for record in items.close_text():
                        yield numbered(record)
                    completed = _completed(head, items, work, each)
                    kind = f"response.{completed['status']}"
                    yield numbered({"type": kind, "response": completed})
    except ClientLeftError:
        raise
    except Exception as error:
        told = stream_error(work, error)["error"]
        failed = {"code": told["code"] or "server_error", "message": told["message"]}
        response = {**head, "status": "failed", "output": items.items, "error": failed, "usage": None}
        yield numbered({"type": "response.failed", "response": response})


def _head(client: Client, asked: ResponsesRequest, model: str) -> dict[str, Any]:
    """What does not change from the beginning of a response to its end."""
    return {
        "id": f"resp_{client.id}",
        "object": "response",
        "created_at": int(time.time()),
        "model": asked.model or model,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "max_output_tokens": asked.max_output_tokens,
        "tool_choice": "auto",
        "tools": [{"type": "image_generation"}],
    }


def _completed(head: dict[str, Any], items: ResponseItems, work: Work, finished: Finished) -> dict[str, Any]:
    is_cut = finished.reason == "length"
    return {
        **head,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": items.items,
        "usage": usage_record(work.usage),
    }
