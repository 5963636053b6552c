"""Markup for images in texts: the spellings of the field, and texts with images put in their place.

A placeholder is markup only in a record that names its images beside its texts, and only if the placeholders
match the images. Anywhere else text is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mm_interleaved.documents.parts import Image, Part, Text

# Each spelling is looked for by itself: of a text that holds two of them, one may be prose. The numbered ones
# say which image they mean.
_SPELLINGS = (
    r"<image>(?:</image>)?",
    r"<image[ _-]?(?P<a>\d{1,4})>",
    r"<\|image[ _-]?(?P<b>\d{1,4})\|>",
    r"\[image[ _-]?(?P<c>\d{1,4})\]",
    r"<img[ _-]?(?P<d>\d{1,4})>",
    r"(?:<\|vision_start\|>)?(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?",
    r"<\|image(?:_placeholder|_start|_token)?\|>",
    r"<image[ _-]?(?:placeholder|here|token|pad)>",
    r"<(?:__)?(?:start_of_image|image_soft_token|image_placeholder|media)(?:__)?>",
    r"<img(?: ?/)?>(?:</img>)?",
    r"<image ?/>",
    r"\[img\]",
    r"\[image\]",
    r"\{\{? ?image ?\}?\}",
    r"<picture>",
)
_PATTERNS = tuple(re.compile(rf"\s*{spelling}\s*", re.IGNORECASE) for spelling in _SPELLINGS)
_OTHER_MEDIA = (
    r"<(?:image|video|audio|speech|sound|frame)s?(?:[ _-]?\d{1,4})?>",
    r"<\|(?:vision|video|audio|AUDIO)(?:_\w+)?\|>",
    r"\[(?:video|audio)\]",
    r"\{(?:video|audio)\}",
    r"<(?:im_patch|im_start|im_end|image_patch|Audio|Video)(?:Here)?>",
)
_ANY = re.compile(
    "|".join(re.sub(r"\?P<\w>", "?:", spelling) for spelling in (*_SPELLINGS, *_OTHER_MEDIA)), re.I
)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for the next image of a record (None), or for that of an index, stated by a part of its own."""

    role: str | None
    index: int | None = None
    path: str = ""
    found: str = ""
    """Where it came from in its record, and what stands there in place of an image; for messages."""


PartOrSlot = Text | Image | Slot


def first_placeholder(text: str) -> str | None:
    """The first markup for an image, a video or a sound in a text, in whatever spelling; None without any."""
    found = _ANY.search(text) if _may_hold_markup(text) else None
    return None if found is None else found.group().strip()


def _may_hold_markup(text: str) -> bool:
    return "<" in text or "[" in text or "{" in text


def with_slots(pieces: Sequence[PartOrSlot], num_images: int) -> list[PartOrSlot] | None:
    """The pieces with their placeholders as slots, if some spelling occurs as often as there are images.

    Args:
        pieces: texts of a record, images that have a source of their own, and slots that it already has.
        num_images: images that are named beside the texts, one for each slot.

    Returns:
        None where no spelling matches.
    """
    # The first spelling that occurs as often as there are images: others may be prose about images.
    wanted = num_images - sum(isinstance(piece, Slot) for piece in pieces)
    has_marks = any(isinstance(piece, Text) and _may_hold_markup(piece.text) for piece in pieces)
    for pattern in _PATTERNS if wanted > 0 and has_marks else ():
        found = list(_split(pieces, pattern))
        slots = [piece for piece in found if isinstance(piece, Slot)]
        if len(slots) == num_images and _is_complete(slots):
            return found
    return list(pieces) if wanted == 0 else None


def _split(pieces: Sequence[PartOrSlot], pattern: re.Pattern[str]) -> Iterator[PartOrSlot]:
    for piece in pieces:
        is_searched = isinstance(piece, Text) and _may_hold_markup(piece.text)
        if not is_searched or not (matches := list(pattern.finditer(piece.text))):
            yield piece
            continue
        begin = 0
        for match in matches:
            if between := piece.text[begin : match.start()]:
                yield replace(piece, text=between)
            number = next((digits for digits in match.groups() if digits), None)
            yield Slot(piece.role, None if number is None else int(number))
            begin = match.end()
        if rest := piece.text[begin:]:
            yield replace(piece, text=rest)


def _is_complete(slots: Sequence[Slot]) -> bool:
    """Whether the numbers, where there are any, name every image once, counted from 0 or from 1."""
    numbers = sorted(slot.index for slot in slots if slot.index is not None)
    return not numbers or any(numbers == list(range(first, first + len(slots))) for first in (0, 1))


def filled(pieces: Sequence[PartOrSlot], images: Sequence[Image | None]) -> list[Part]:
    """The parts: each slot is the image of its number, or the next one; None is an image left out."""
    numbers = [piece.index for piece in pieces if isinstance(piece, Slot) and piece.index is not None]
    first = min(numbers, default=0)
    waiting = iter(images)
    parts: list[Part] = []
    for piece in pieces:
        if not isinstance(piece, Slot):
            parts.append(piece)
            continue
        image = next(waiting) if piece.index is None else images[piece.index - first]
        if image is not None:
            parts.append(replace(image, role=piece.role))
    return parts


def images_first(pieces: Sequence[PartOrSlot], images: Sequence[Image | None]) -> list[Part]:
    """The parts with all images before the first text that is no system sentence."""
    at = next((place for place, piece in enumerate(pieces) if piece.role != "system"), len(pieces))
    role = pieces[at].role if at < len(pieces) else None
    return filled([*pieces[:at], *(Slot(role) for _ in images), *pieces[at:]], images)
