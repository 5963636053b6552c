"""The body of POST /v1/images/generations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mm_interleaved.serving.request_fields import GenerationFields, Label


class ImagesRequest(GenerationFields):
    """An image of a text."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    """b64_json unless asked otherwise; url is an address of this server, good for a while."""
    stream: bool | None = None

    # What OpenAI's clients send and what changes nothing here.
    user: Label = None
    quality: Annotated[str, Field(max_length=40)] | None = None
    style: Annotated[str, Field(max_length=40)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
