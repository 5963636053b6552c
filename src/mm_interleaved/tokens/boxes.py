"""Boxes in images, and how a box stands in an answer.

A box is checked where it is made, so that no answer is written of one that means nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

from mm_interleaved.documents.document import Image
from mm_interleaved.documents.images import upright_size
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import ImageError

BOX_RANGE = 1000
"""A box counts in this many parts of the image's side: 0 to 999."""
_BOX = re.compile(r"\((\d{1,4}),\s*(\d{1,4})\)\s*\((\d{1,4}),\s*(\d{1,4})\)")

Edges: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; the right and lower ends lie outside the box."""

TOLERANCE = 1.0
"""Pixels by which an edge may lie outside its image: annotators round, and count from 0 or from 1."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box that lies in an image of `width` x `height` pixels. Raises ValueError where it does not."""

    edges: Edges
    width: float
    height: float

    def __post_init__(self):
        left, top, right, bottom = self.edges
        shown, size = list(self.edges), f"{self.width:g} x {self.height:g} pixels"
        if not all(map(math.isfinite, self.edges)) or not (left < right and top < bottom):
            raise ValueError(f"found the box {shown}, expected left < right and top < bottom")
        is_inside = min(left, top) >= -TOLERANCE and right <= self.width + TOLERANCE
        if not is_inside or bottom > self.height + TOLERANCE:
            raise ValueError(f"found the box {shown}, which does not lie in the image of {size}")
        # Read as pixels, shares of the image would all mean its first pixel.
        if max(self.edges) <= 1 < max(self.width, self.height):
            raise ValueError(f"found the box {shown}, which looks like shares of the image, expected pixels")

    def answer(self) -> str:
        """The box as it is asked for: in thousandths of the image, rounded down, at most 999."""
        sides = (self.width, self.height, self.width, self.height)
        left, top, right, bottom = (
            min(max(int(edge * BOX_RANGE // side), 0), BOX_RANGE - 1)
            for edge, side in zip(self.edges, sides, strict=True)
        )
        return write_box((left, top, right, bottom))


def box_in_image(edges: Edges, size: tuple[int, int], field: Field) -> Box:
    """The box that stands in a field. Raises FieldError where it does not lie in the image."""
    try:
        return Box(edges, *size)
    except ValueError as error:
        raise FieldError(field.path, str(error)) from error


def four_numbers(field: Field) -> Edges:
    """Four finite numbers."""
    values = [item.value for item in field.list()]
    is_box = len(values) == 4 and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
    if not is_box:
        field.wrong("four numbers")
    first, second, third, fourth = map(float, values)
    return first, second, third, fourth


def size_of_image(image: Image, recorded: tuple[int, int] | None, path: str) -> tuple[int, int]:
    """Width and height of the frame in which an image's boxes are measured.

    Args:
        recorded: the size that stands in the record; the image's own counts where there is none.
        path: the field of the record, for messages.

    Raises:
        FieldError: the image has another shape than its record says: its boxes mean another image.
        ImageError: the image cannot be read, and no size is recorded.
    """
    try:
        found = upright_size(image.source, name=image.name)
    except ImageError:
        if recorded is None:
            raise
        # That it cannot be read is reported where it is opened.
        return recorded
    if recorded is not None and not _is_same_shape(recorded, found):
        raise FieldError(
            path,
            f"found {recorded[0]} x {recorded[1]} pixels, but the image has {found[0]} x {found[1]}",
        )
    return recorded or found


def _is_same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one is the other at another scale, sides rounded to whole pixels."""
    scale = max(side / wanted for side, wanted in zip(other, one, strict=True))
    return all(abs(side * scale - wanted) <= 1 for side, wanted in zip(one, other, strict=True))


def write_box(box: tuple[int, int, int, int]) -> str:
    """`(xxx,yyy)(xxx,yyy)`: left, top, right, bottom, each below BOX_RANGE."""
    left, top, right, bottom = box
    return f"({left:03d},{top:03d})({right:03d},{bottom:03d})"


def read_box(text: str) -> tuple[int, int, int, int] | None:
    """The first box of a text (left, top, right, bottom), or None; numbers up to four digits are taken."""
    match = _BOX.search(text)
    if match is None:
        return None
    left, top, right, bottom = (int(number) for number in match.groups())
    return left, top, right, bottom


def box_iou(first: Edges, second: Edges) -> float:
    """Intersection over union, 0 to 1, in any unit that both share; a box that is empty overlaps nothing."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    if shared == 0:
        return 0.0
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Edges) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
