"""One reader of settings: from JSON, from text, back to JSON, with ranges, choices and the nearest names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

import pytest

from mm_interleaved.errors import UsageError
from mm_interleaved.typed_settings import (
    Choice,
    Named,
    Range,
    check,
    fits,
    flat_record,
    from_json,
    from_record,
    override,
    to_record,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Brush:
    width: Annotated[float, Range(0, 10, excludes_low=True)] = 1.0
    colours: Annotated[tuple[int, ...], Range(0, 255)] = (0, 128)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    size: Annotated[int, Range(1, 4096)]
    ground: Annotated[str | None, Choice(("paper", "linen"))] = None
    is_framed: bool = False
    brush: Brush = field(default_factory=Brush)

    def __post_init__(self):
        check(self)


SHADES = MappingProxyType({"dark": (0, 0, 0), "light": (255, 255, 255)})
CANVAS = Canvas(size=64, ground="linen", brush=Brush(width=2.5, colours=(1, 2, 3)))


def test_settings_come_back_from_json_with_their_types():
    again = from_record(Canvas, json.loads(json.dumps(to_record(CANVAS))))
    assert again == CANVAS and again.brush.colours == (1, 2, 3)


def test_text_and_json_read_the_same_settings():
    read = override(Canvas(size=64), ["ground=linen", "brush.width=2.5", "brush.colours=1,2,3"])
    assert read == CANVAS
    assert override(read, ["ground=none", "is_framed=true"]) == Canvas(
        size=64, is_framed=True, brush=CANVAS.brush
    )
    assert list(flat_record(read)) == ["size", "ground", "is_framed", "brush.width", "brush.colours"]


def test_a_whole_number_is_a_fraction_and_true_is_no_number():
    width = from_record(Brush, {"width": 7}).width
    assert width == 7.0 and type(width) is float
    assert fits(7, float) and fits(None, float | None)
    assert not fits(True, float) and not fits(True, int) and not fits(1, bool)
    assert not fits(float("nan"), float) and not fits(float("inf"), float)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"size": "64"}, "settings.size: expected int, found '64'"),
        ({"size": True}, "settings.size: expected int, found True"),
        ({"size": 0}, "size: found 0, expected 1 to 4096"),
        (
            {"size": 64, "ground": "lined"},
            "ground: found 'lined', expected one of paper, linen (did you mean",
        ),
        ({"size": 64, "ground": 3}, "settings.ground: expected str or null, found 3"),
        ({"size": 64, "grund": "linen"}, "settings: found 'grund', .*did you mean 'ground'"),
        ({"size": 64, "brush": {"width": 0}}, "width: found 0.0, expected more than 0"),
        ({"size": 64, "brush": {"colours": [1, "2"]}}, "settings.brush.colours: expected int, found '2'"),
        ({"size": 64, "brush": {"colours": [1, 256]}}, "colours: found 256, expected 0 to 255"),
        ({"size": 64, "brush": [1]}, "settings.brush: expected some of width, colours, found [1]"),
        ({}, "settings.size: missing"),
    ],
)
def test_what_is_wrong_in_json_is_named_with_what_was_expected(record, sentence):
    pattern = sentence.replace("(", r"\(").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(UsageError, match=f"^{pattern}"):
        from_record(Canvas, record)


def test_ready_made_values_are_given_by_name():
    hint = Annotated[tuple, Named(SHADES)]
    assert from_json("dark", hint, "shade") == (0, 0, 0)
    assert from_json((1, 2, 3), hint, "shade") == (1, 2, 3)
    with pytest.raises(UsageError, match=r"shade: found 'drak', .*did you mean 'dark'") as refused:
        from_json("drak", hint, "shade", field="shade")
    assert refused.value.field == "shade"
    with pytest.raises(UsageError, match="shade: expected tuple, found 3"):
        from_json(3, hint, "shade")
