"""Boxes found against boxes meant: referring expressions (RefCOCO, RefCOCO+, RefCOCOg).

A box is (left, top, right, bottom), in any unit that both sides share.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Box = tuple[float, float, float, float]

RIGHT_FROM = 0.5
"""Intersection over union from which a box counts as found, the convention of the field."""


def iou(first: Box, second: Box) -> float:
    """Intersection over union, 0 to 1; boxes that are empty or turned round overlap with nothing."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    if shared == 0:
        return 0.0
    return shared / (_area(first) + _area(second) - shared)


def box_accuracy(found: Sequence[Box | None], meant: Sequence[Box]) -> float:
    """Share of boxes that overlap with the one that was meant by half or more; None is no box at all."""
    pairs = zip(found, meant, strict=True)
    return fmean(box is not None and iou(box, gold) >= RIGHT_FROM for box, gold in pairs) if meant else 0.0


def in_thousandths(box: Box, width: float, height: float) -> Box:
    """A box in pixels on the grid of 0 to 999 that answers are written in.

    The released evaluation compares on this grid (`compat="released"`); the correct way compares in pixels.
    """
    left, top, right, bottom = box
    return (
        _cell(left / width), _cell(top / height), _cell(right / width), _cell(bottom / height),
    )  # fmt: skip


def _cell(share: float) -> float:
    return float(min(999, max(0, int(share * 1000))))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
