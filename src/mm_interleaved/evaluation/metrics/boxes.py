"""Boxes found against boxes meant: referring expressions (RefCOCO, RefCOCO+, RefCOCOg).

A box is (left, top, right, bottom), in any unit that both sides share.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mm_interleaved.tokens.boxes import Edges as Box
from mm_interleaved.tokens.boxes import box_iou

RIGHT_FROM = 0.5
"""Intersection over union from which a box counts as found, the convention of the field."""


def box_accuracy(found: Sequence[Box | None], meant: Sequence[Box]) -> float:
    """Share of boxes that overlap with the one that was meant by half or more; None is no box at all."""
    pairs = zip(found, meant, strict=True)
    return (
        fmean(box is not None and box_iou(box, gold) >= RIGHT_FROM for box, gold in pairs) if meant else 0.0
    )


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
