"""What a harness asks, as a document with a hole.

context and visuals (lmms-eval's simple models), messages (its chat models), items (VLMEvalKit) -> Document
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.placeholders import filled, images_first, with_slots
from mm_interleaved.errors import InputError, escape

USER = "user"
_PLACEHOLDERS = (re.compile("<image>"), re.compile(r"<image \d{1,4}>"))
"""The spellings of lmms-eval's tasks; the field has more, which there are text."""
_OTHER_MEDIA = {
    "video": (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"),
    "audio": (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"),
}


def document_of_context(context: str, visuals: Any, key: str, *, is_conversation: bool) -> Document:
    """A text and the images that belong to it.

    Where the text has as many placeholders (`<image>`, or `<image 1>` and so on) as there are images, these
    stand in their place, else before the text; then what looks like a placeholder is text.

    Args:
        visuals: images, in whatever form a harness has them; one, a list, or None.
        key: the document's id, which also seeds what is sampled.
        is_conversation: it is what the user says, and the assistant answers; else it is gone on with.

    Raises:
        InputError: something that is no image.
    """
    given = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    images = [_image(visual, key) for visual in given]
    pieces = [Text(context)] if context else []
    is_marked = any(len(spelling.findall(context)) == len(images) for spelling in _PLACEHOLDERS)
    placed = with_slots(pieces, len(images)) if is_marked else None
    parts = images_first(pieces, images) if placed is None else filled(placed, images)
    return _document(key, [(USER, part) for part in parts], is_conversation)


def document_of_messages(
    messages: Sequence[Mapping[str, Any]], key: str, *, is_conversation: bool
) -> Document:
    """Messages of `role` and `content`; the content is a text or a list of parts by `type`, in their order.

    Text is text, whatever it spells. What several speakers said is a conversation in any case. Arguments and
    errors as `document_of_context`.
    """
    said = [(str(message["role"]), part) for message in messages for part in _parts(message["content"], key)]
    is_dialogue = len({role for role, _ in said}) > 1
    return _document(key, said, is_conversation or is_dialogue)


def document_of_items(items: Sequence[Mapping[str, str]], key: str, *, is_conversation: bool) -> Document:
    """Items of `type` and `value`, in their order. Arguments and errors as `document_of_messages`."""
    return document_of_messages([{"role": USER, "content": items}], key, is_conversation=is_conversation)


def _parts(content: Any, key: str) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)] if content else []
    parts: list[Part] = []
    for item in content:
        if item["type"] == "text":
            text = item["text"] if "text" in item else item["value"]
            parts += [Text(text)] if text else []
        else:
            parts.append(_image(item, key))
    return parts


def _image(visual: Any, key: str) -> Image:
    """An image, a path of one, or an object that has one (`url`, `image`, `value`, `bytes`, `path`)."""
    kind = str(visual.get("type", "image")) if isinstance(visual, Mapping) else "image"
    source = _source(visual)
    kind = _other_medium(source) or kind
    if kind not in ("image", "image_url"):
        raise InputError(f"{escape(key)}: found {escape(repr(kind))}, expected texts and images alone")
    try:
        return Image(source)
    except TypeError as error:
        raise InputError(f"{escape(key)}: {error}") from error
    except InputError as error:
        raise type(error)(f"{escape(key)}: {error}") from error


def _source(visual: Any) -> Any:
    if not isinstance(visual, Mapping):
        return visual
    names = ("url", "image", "value", "bytes", "path")
    return next((visual[name] for name in names if visual.get(name) is not None), visual)


def _other_medium(source: Any) -> str | None:
    """What the name of a file says that it is, where it is no image."""
    suffix = PurePath(source).suffix.lower() if isinstance(source, str | PurePath) else ""
    return next((name for name, suffixes in _OTHER_MEDIA.items() if suffix in suffixes), None)


def _document(key: str, said: Sequence[tuple[str, Part]], is_conversation: bool) -> Document:
    parts = [replace(part, role=role) if is_conversation else part for role, part in said]
    return Document(id=key, parts=tuple(parts))
