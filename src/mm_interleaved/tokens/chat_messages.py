"""Messages as users of transformers write them, as the parts of a conversation.

Text is data here too: what a text spells never becomes markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.documents.image_references import ImageFolder, embedded_image
from mm_interleaved.documents.strict_json import Field

_TEXT_TYPES, _IMAGE_TYPES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_SOURCES = ("image", "path", "url", "image_url", "base64")
_TO_COME = b"an image that is yet to come"
"""The source of an image of which only the place is known so far; known by its identity, so not an empty one,
which anybody may give.
"""


def is_conversation(value: Any) -> bool:
    """Whether it is one conversation: a list of messages."""
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def read_messages(messages: Sequence[Mapping[str, Any]], image_root: str | Path = ".") -> list[Part]:
    """The parts of a conversation, each with its role; images without a source are yet to come.

    Args:
        messages: objects with `role` and `content`: a string, or a list of strings and of parts of type
            `text` (`text`) or `image` (`image`, `path`, `url` or `base64`; an image in memory, a path, a
            `data:` URL) or `image_url`.
        image_root: folder that bounds paths given as strings.

    Raises:
        ValueError: names the place of what is wrong.
    """
    parts: list[Part] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role = message.get("role")
        if not isinstance(role, str) or not role.isprintable() or not role:
            raise ValueError(f"{place}.role: found {role!r}, expected a name such as user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            parts.append(Text(content, role=role))
        elif isinstance(content, list | tuple):
            for index, item in enumerate(content):
                parts.append(_part(item, role, f"{place}.content[{index}]", Path(image_root)))
        else:
            raise ValueError(f"{place}.content: found {type(content).__name__}, expected a text or a list")
    return parts


def _part(item: Any, role: str, place: str, root: Path) -> Part:
    if isinstance(item, str):
        return Text(item, role=role)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in _TEXT_TYPES:
        if not isinstance(item.get("text"), str):
            raise ValueError(f"{place}.text: found {item.get('text')!r}, expected a text")
        return Text(item["text"], role=role)
    if kind not in _IMAGE_TYPES:
        unknown = kind or type(item).__name__
        raise ValueError(f"{place}: found {unknown!r}, expected a part of type text or image")
    found = [name for name in _SOURCES if item.get(name) is not None]
    if not found:
        return Image(_TO_COME, role=role)
    source = item[found[0]]
    if isinstance(source, Mapping):
        source = source.get("url")
    if found[0] == "base64" and isinstance(source, str):
        source = f"data:image/png;base64,{source}"
    return replace(given_image(source, f"{place}.{found[0]}", root), role=role)


def given_image(source: Any, place: str, root: Path | None) -> Image:
    """An image by what names it; strings are bounded by a folder, if one is given.

    Raises:
        ValueError: it names none.
    """
    if isinstance(source, Image):
        return source
    if not isinstance(source, str):
        try:
            return Image(source)
        except TypeError as error:
            raise ValueError(f"{place}: {str(error).removeprefix('image: ')}") from error
    field = Field(source, place)
    return embedded_image(field) or (Image(Path(source)) if root is None else _in_folder(field, root))


def _in_folder(field: Field, root: Path) -> Image:
    image = ImageFolder(root, root).image(field)
    assert image is not None, "missing files are refused, not left out"
    return image


def is_to_come(part: Part) -> bool:
    """Whether it is an image of which only the place is known so far."""
    return isinstance(part, Image) and part.source is _TO_COME
