"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mm_interleaved.serving.request_body import Echoed, Strict
from mm_interleaved.serving.request_fields import Count, DocumentFields, ImageKind, Nothing, Size, Text


class InputText(Echoed):
    """A text, given or of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Strict):
    """An image by its address, see `chat_request.ImageUrl`."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Echoed):
    """A message, given or of an earlier answer."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Echoed):
    """An image of an earlier answer."""

    type: Literal["image_generation_call"]
    result: str | None
    id: str | None = None
    status: str | None = None
    output_format: ImageKind | None = None
    size: str | None = None
    quality: str | None = None
    background: str | None = None
    action: str | None = None
    revised_prompt: str | None = None
    seed: int | None = None


def _type(item: Any) -> str | None:
    """What an item is; a message need not say so."""
    found = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if found is None else found if isinstance(found, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputCall, Tag("image_generation_call")],
    Discriminator(_type),
]


class ImageTool(Strict):
    """OpenAI's switch for images; here they need none, but it may say how they shall be."""

    type: Literal["image_generation"]
    size: Size = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    output_format: ImageKind | None = None
    model: Annotated[str, Field(max_length=256)] | None = None
    quality: Annotated[str, Field(max_length=40)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None


class ToolChoice(Strict):
    """The tool that must be used."""

    type: Literal["image_generation"]


class PlainText(Strict):
    """The only format of texts."""

    type: Literal["text"]


class TextOptions(Strict):
    """How texts shall be."""

    format: PlainText | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(DocumentFields):
    """Texts and images to be continued, and answered as an ordered list of items."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    instructions: Text | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_obfuscation"], bool] | None = None
    max_output_tokens: Count = None
    tools: Annotated[list[ImageTool], Field(max_length=1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    # What OpenAI's clients send and what changes nothing here.
    background: Literal[False] | None = None
    include: Nothing = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    """Nothing is stored: send earlier items again."""
