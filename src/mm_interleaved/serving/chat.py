"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm_interleaved.generation.events import Finished
from mm_interleaved.serving.answers import Answer, joined
from mm_interleaved.serving.chat_request import ChatRequest
from mm_interleaved.serving.client import DONE, KEEP_ALIVE, Client, EventStream, event
from mm_interleaved.serving.content import Content
from mm_interleaved.serving.conversation import given_by
from mm_interleaved.serving.errors import ClientLeftError, bad_request
from mm_interleaved.serving.names import answer_format, files_url, wants_document
from mm_interleaved.serving.request_body import read_body
from mm_interleaved.serving.request_fields import given_settings
from mm_interleaved.serving.work import Services, Usage, Work, left, open_work, stream_error

REASONS = {"length": "length"}
"""OpenAI's words for the reasons of `Finished`; the others are `stop` there."""


async def complete_chat(services: Services, request: Request) -> Response:
    """Continues a conversation, at once or as a stream."""
    asked = await read_body(request, ChatRequest)
    shown = answer_format(services.settings, asked.model, asked.answer_format)
    given = given_settings(asked, services.settings.limits)
    if len(asked.messages) > services.settings.limits.messages:
        raise bad_request(
            "messages",
            f"found {len(asked.messages)}, expected at most {services.settings.limits.messages}",
            "array_above_max_length",
        )
    client = Client(request)
    work = None
    try:
        document = await client.wait_for(
            _document(services.content, client.id, asked, wants_document(asked, given.settings))
        )
        work = await open_work(services, client, document, asked, given)
        answer = Answer(
            shown,
            asked.output_format or "png",
            services.files,
            files_url(services.settings, request),
            None if asked.preview_every else asked.partial_images,
        )
        head = {
            "id": f"chatcmpl-{client.id}",
            "created": int(time.time()),
            "model": asked.model or services.settings.model,
        }
        if asked.stream:
            return EventStream(_stream(work, answer, head, asked), work.leave)
        record = await _whole(work, answer, head, shown)
    except BaseException:
        await left(client, work)
        raise
    await work.leave()
    return JSONResponse(record)


async def _document(content: Content, id: str, asked: ChatRequest, is_document: bool):
    return await content.document(id, list(given_by(asked.messages)), roles=not is_document, param="messages")


async def _whole(work: Work, answer: Answer, head: dict[str, Any], shown: str) -> dict[str, Any]:
    events = await work.finished()
    finished = events[-1]
    assert isinstance(finished, Finished), "a stream ends with it"
    deltas = [delta for each in events if (delta := await answer.delta(each)) is not None]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "refusal": None, **joined(deltas, shown)},
        "logprobs": None,
        "finish_reason": REASONS.get(finished.reason, "stop"),
    }
    usage = usage_record(work.usage)
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


async def _stream(
    work: Work, answer: Answer, head: dict[str, Any], asked: ChatRequest
) -> AsyncGenerator[bytes, None]:
    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
    try:
        yield chunk({"role": "assistant"})
        async with aclosing(work.events()) as events:
            async for each in events:
                if each is None:
                    yield KEEP_ALIVE
                elif isinstance(each, Finished):
                    yield chunk({}, REASONS.get(each.reason, "stop"))
                    if wants_usage:
                        usage = usage_record(work.usage)
                        yield event(
                            {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}
                        )
                elif (delta := await answer.delta(each)) is not None:
                    is_image = "images" in delta or isinstance(delta.get("content"), list)
                    more = {"modality": "image"} if is_image and "text" not in _kinds(delta) else {}
                    yield chunk(delta, **more)
        yield DONE
    except ClientLeftError:
        raise
    except Exception as error:
        yield event(stream_error(work, error))
        yield DONE


def _kinds(delta: dict[str, Any]) -> set[str]:
    content = delta.get("content")
    return {part["type"] for part in content} if isinstance(content, list) else set()


def usage_record(usage: Usage) -> dict[str, Any]:
    """As chat completions tell it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.reused},
        "completion_tokens_details": {"text_tokens": usage.text, "image_tokens": usage.images},
    }
