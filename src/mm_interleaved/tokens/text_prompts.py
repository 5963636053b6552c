"""Texts with images as pieces of a prompt, and pieces as text.

    messages -> chat_messages.read_messages -> parts -> conversation_format.chat_pieces -> pieces
    text, images -> text_pieces -> pieces

What a text spells never becomes markup, but for the places of given images, which the caller marks in the
text that is given together with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.errors import escape
from mm_interleaved.tokens.chat_messages import given_image, is_to_come
from mm_interleaved.tokens.conversation_format import PromptPiece


class RenderedPrompt(str):
    """A prompt as text that remembers what of it is markup; made from pieces by `rendered`.

    Given back to the processor it means what it meant before, also where texts in it spell markup. Any change
    makes a plain string of it.
    """

    pieces: tuple[PromptPiece, ...]


def rendered(pieces: Sequence[PromptPiece], *, bos: str, eos: str, image: str) -> RenderedPrompt:
    """Pieces as text, special tokens spelled out; an image is one token."""
    text = bos
    for piece in pieces:
        text += image if isinstance(piece.part, Image) else piece.part.text
        text += eos if piece.ends_turn else ""
    prompt = RenderedPrompt(text)
    prompt.pieces = tuple(pieces)
    return prompt


def text_pieces(texts: Sequence[str], images: Any, placeholder: str) -> list[list[PromptPiece]]:
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
        yield given_image(source, f"{place}[{index}]", root=None)


def _placed(text: str, images: list[Image] | None, placeholder: str) -> list[PromptPiece]:
    if isinstance(text, RenderedPrompt):
        return with_images(text.pieces, images)
    if not images:
        return [PromptPiece(Text(text), is_target=False)] if text else []
    count = text.count(placeholder)
    if count not in (0, len(images)):
        raise ValueError(
            f"text: found {count} times {escape(placeholder)}, expected one for each of {len(images)} images"
        )
    texts = text.split(placeholder) if count else [*[""] * len(images), text]
    parts: list[Part] = [Text(texts[0])]
    for image, after in zip(images, texts[1:], strict=True):
        parts += [image, Text(after)]
    return [PromptPiece(part, is_target=False) for part in parts if isinstance(part, Image) or part.text]


def with_images(pieces: Sequence[PromptPiece], images: Sequence[Image] | None) -> list[PromptPiece]:
    """The pieces with given images in the places of those to come, or of all of them.

    Raises:
        ValueError: another number of images.
    """
    places = [index for index, piece in enumerate(pieces) if isinstance(piece.part, Image)]
    to_come = [index for index in places if is_to_come(pieces[index].part)]
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
