"""The messages of a chat request, part by part, in whichever format answers were sent back."""

from __future__ import annotations

from collections.abc import Iterator

from mm_interleaved.serving.chat_request import (
    AssistantMessage,
    ImagePart,
    ImageUrl,
    SystemMessage,
    TextPart,
    UserMessage,
)
from mm_interleaved.serving.content import Given, GivenImage, GivenText
from mm_interleaved.serving.errors import bad_request

ROLES = {"developer": "system"}
"""OpenAI's newer word for the same."""


def given_by(messages: list[SystemMessage | UserMessage | AssistantMessage]) -> Iterator[Given]:
    """Texts and images of messages, in order. Raises ApiError."""
    for number, message in enumerate(messages):
        role = ROLES.get(message.role, message.role)
        place = f"messages.{number}"
        if isinstance(message, AssistantMessage) and message.images:
            yield from _with_images(message, place)
        elif isinstance(message.content, str):
            yield GivenText(message.content, role, f"{place}.content")
        else:
            for index, part in enumerate(message.content or ()):
                yield _of_part(part, role, f"{place}.content.{index}")


def _of_part(part: TextPart | ImagePart, role: str, place: str) -> Given:
    if isinstance(part, TextPart):
        return GivenText(part.text, role, f"{place}.text")
    return _image(part.image_url, role, f"{place}.image_url.url")


def _image(image_url: ImageUrl, role: str, param: str) -> GivenImage:
    return GivenImage(image_url.url, role, param)


def _with_images(message: AssistantMessage, place: str) -> Iterator[Given]:
    """An answer in the format `images`: each image stands in the text at its offset, else at the end."""
    if message.content is not None and not isinstance(message.content, str):
        raise bad_request(
            f"{place}.images", "expected none beside a list of parts, which holds them in order"
        )
    text, position = message.content or "", 0
    for index, image in enumerate(message.images or ()):
        offset = len(text) if image.text_offset is None else min(image.text_offset, len(text))
        if offset < position:
            raise bad_request(
                f"{place}.images.{index}.text_offset", f"found {offset}, expected at least {position}"
            )
        # The blank lines between texts around an image are ours, see `answers`.
        yield GivenText(text[position:offset].strip("\n"), message.role, f"{place}.content")
        yield _image(image.image_url, message.role, f"{place}.images.{index}.image_url.url")
        position = offset
    yield GivenText(text[position:].strip("\n"), message.role, f"{place}.content")
