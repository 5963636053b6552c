"""Conversations as users of transformers write them, and texts with images, as pieces of a prompt.

    messages -> read_messages -> parts -> prompts.chat_pieces -> pieces
    text, images -> text_pieces -> pieces

Text is data here too: what a text spells never becomes markup, but for the places of given images, which the
caller marks in the text that is given together with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.documents.image_references import ImageFolder, embedded_image
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.errors import escape
from mm_interleaved.tokens.prompts import Piece

_TEXT_TYPES, _IMAGE_TYPES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_SOURCES = ("image", "path", "url", "image_url", "base64")
_TO_COME = b"an image that is yet to come"
"""The source of an image of which only the place is known so far; known by its identity, so not an empty one,
which anybody may give.
"""


class RenderedPrompt(str):
    """A prompt as text that remembers what of it is markup; made from pieces by `rendered`.

    Given back to the processor it means what it meant before, also where texts in it spell markup. Any change
    makes a plain string of it.
    """

    pieces: tuple[Piece, ...]


def rendered(pieces: Sequence[Piece], *, bos: str, eos: str, image: str) -> RenderedPrompt:
    """Pieces as text, special tokens spelled out; an image is one token."""
    text = bos
    for piece in pieces:
        text += image if isinstance(piece.part, Image) else piece.part.text
        text += eos if piece.ends_turn else ""
    prompt = RenderedPrompt(text)
    prompt.pieces = tuple(pieces)
    return prompt


# ---- Conversations -------------------------------------------------------------------------------


def is_conversation(value: Any) -> bool:
    """Whether it is one conversation: a list of messages."""
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def read_messages(messages: Sequence[Mapping[str, Any]], image_root: str | Path = ".") -> list[Part]:
    """The parts of a conversation, each with its role; images without a source are yet to come.

    Args:
        messages: objects with `role` and `content`: a string, or a list of strings and of parts of type
            `text` (`text`) or `image` (`image`, `path`, `url` or `base64`; a picture in memory, a path, a
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
    return replace(_image(source, f"{place}.{found[0]}", root), role=role)


def _image(source: Any, place: str, root: Path | None) -> Image:
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


# ---- Texts with images beside them ---------------------------------------------------------------


def text_pieces(texts: Sequence[str], images: Any, placeholder: str) -> list[list[Piece]]:
    """The pieces of each text with its images.

    A text that holds as many placeholders as it has images has them there, one that holds none has them at
    its beginning. Without images a placeholder is text like any other.

    Args:
        images: None; one image; of one text, a list; of several, a list of lists, or a flat list in the order
            of all placeholders (or one image each).

    Raises:
        ValueError: numbers that do not agree.
    """
    counts = [_count(text, placeholder) for text in texts]
    groups = _images_of_texts(images, counts)
    return [_placed(text, group, placeholder) for text, group in zip(texts, groups, strict=True)]


def _count(text: str, placeholder: str) -> int:
    if isinstance(text, RenderedPrompt):
        return sum(isinstance(piece.part, Image) for piece in text.pieces)
    return text.count(placeholder)


def _images_of_texts(images: Any, counts: Sequence[int]) -> list[list[Image] | None]:
    """Images by text; None where none were given."""
    if images is None:
        return [None] * len(counts)
    if not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(group, list | tuple) for group in images):
        if len(images) != len(counts) or not all(isinstance(group, list | tuple) for group in images):
            raise ValueError(f"images: found {len(images)} entries, expected {len(counts)} lists, one a text")
        return [list(_images(group, f"images[{number}]")) for number, group in enumerate(images)]
    flat = list(_images(images, "images"))
    if len(counts) == 1:
        return [flat]
    if sum(counts) != len(flat):
        if sum(counts) or len(flat) != len(counts):
            raise ValueError(
                f"images: found {len(flat)}, expected {sum(counts)}, as many as placeholders in the texts"
            )
        counts = [1] * len(counts)
    waiting = iter(flat)
    return [[next(waiting) for _ in range(count)] for count in counts]


def _images(group: Iterable[Any], place: str) -> Iterator[Image]:
    for index, source in enumerate(group):
        yield _image(source, f"{place}[{index}]", root=None)


def _placed(text: str, images: list[Image] | None, placeholder: str) -> list[Piece]:
    if isinstance(text, RenderedPrompt):
        return with_images(text.pieces, images)
    if not images:
        return [Piece(Text(text), is_target=False)] if text else []
    count = text.count(placeholder)
    if count not in (0, len(images)):
        raise ValueError(
            f"text: found {count} times {escape(placeholder)}, expected one for each of {len(images)} images"
        )
    texts = text.split(placeholder) if count else [*[""] * len(images), text]
    parts: list[Part] = [Text(texts[0])]
    for image, after in zip(images, texts[1:], strict=True):
        parts += [image, Text(after)]
    return [Piece(part, is_target=False) for part in parts if isinstance(part, Image) or part.text]


def with_images(pieces: Sequence[Piece], images: Sequence[Image] | None) -> list[Piece]:
    """The pieces with given images in the places of those to come, or of all of them.

    Raises:
        ValueError: another number of images.
    """
    places = [index for index, piece in enumerate(pieces) if isinstance(piece.part, Image)]
    to_come = [index for index in places if _is_to_come(pieces[index].part)]
    if images is None:
        images, places = [], to_come
    elif len(images) == len(to_come):
        places = to_come
    if len(images) != len(places):
        raise ValueError(f"images: found {len(images)}, expected the {len(places)} of the prompt")
    given = dict(zip(places, images, strict=True))
    return [
        replace(piece, part=replace(given[index], role=piece.part.role)) if index in given else piece
        for index, piece in enumerate(pieces)
    ]


def _is_to_come(part: Part) -> bool:
    return isinstance(part, Image) and part.source is _TO_COME
