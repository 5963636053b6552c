"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm_interleaved.serving.request_body import Echoed, Strict
from mm_interleaved.serving.request_fields import (
    AnswerFormat,
    Count,
    DocumentFields,
    NoPenalty,
    Nothing,
    One,
    Text,
)


class ImageUrl(Strict):
    """A data: URL, an address of this server's own files, or one on the server's list of allowed hosts."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    """A text."""

    type: Literal["text"]
    text: Text
    index: int | None = None


class ImagePart(Echoed):
    """An image; what answers add to it may be sent back."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = None
    text_offset: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Name = Annotated[str, Field(max_length=256)] | None


class SystemMessage(Strict):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: Text | list[TextPart]
    name: Name = None


class UserMessage(Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: Text | list[Part]
    name: Name = None


class AssistantMessage(Echoed):
    """What the model said and generated, in any of the formats of answers."""

    role: Literal["assistant"]
    content: Text | list[Part] | None = None
    images: list[ImagePart] | None = None
    name: Name = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None
    annotations: list[Any] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    """Plain text, the only format there is."""

    type: Literal["text"]


class ChatRequest(DocumentFields):
    """A conversation to be continued."""

    model: Annotated[str, Field(max_length=256)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    answer_format: AnswerFormat | None = None
    """images: text in `content`, images in `images`. parts: `content` is the list of parts in order.
    markdown: images stand in the text as short addresses. The model's name may say it too, after a colon."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None

    # What OpenAI's clients send and what changes nothing here.
    n: One = None
    response_format: TextFormat | None = None
    presence_penalty: NoPenalty = None
    frequency_penalty: NoPenalty = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    stop: Nothing = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
