"""Boards: what hangs in a scene and shows hundreds of random bits, and the scenes that have one.

A board's cells are independent of each other and of everything else, and no text states them: who wants to
show the board again must look at an image of it. A board is an ever same square of units, drawn at one or two
pixels a unit; an image of 128 pixels shows boards of twice as many units a side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.language import AT
from mm_interleaved.storyworld.world import (
    ACTIONS,
    GLYPHS,
    PLACES,
    POSITIONS,
    PROP_COLOURS,
    PROPS,
    SPLITS,
    TIMES,
    WEATHERS,
    Character,
    Figure,
    Prop,
    Scene,
    random_cast,
    scene_from_record,
    scene_to_record,
)

IMAGE_SIZES = (64, 128)
"""Pixels a side. The smaller is that of all other images of StoryWorld."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardKind:
    """What boards of one kind are made of."""

    values: tuple[str, ...]
    """What a cell may show, all equally likely."""
    cell: str
    """The word for a cell."""
    cell_units: tuple[int, int]
    """Height and width of a cell in units."""


QUILT_COLOURS = ("black", "red", "green", "yellow", "blue", "pink", "turquoise", "white")
STARS = ("none", "white", "yellow", "red")
KINDS: Mapping[str, BoardKind] = {
    "quilt": BoardKind(values=QUILT_COLOURS, cell="patch", cell_units=(2, 2)),
    "poster": BoardKind(values=tuple(GLYPHS), cell="sign", cell_units=(8, 6)),
    "constellation": BoardKind(values=STARS, cell="star", cell_units=(3, 3)),
}
BOARD_UNITS = 24
"""Units of a board's side in an image of 64 pixels."""
SCALES = {"small": 1, "large": 2}
"""Pixels a unit."""
HEIGHTS = ("high", "halfway", "low")
# Left and top in pixels of an image of 64; multiples of four, so that a board always lies in the same way on
# the latent grid of a factor-four VAE.
_LEFTS = {"small": {"left": 0, "middle": 20, "right": 40}, "large": {"left": 0, "right": 16}}
_TOPS = {
    "small": {"high": 0, "halfway": 20, "low": 36},
    "large": {"high": 0, "halfway": 8, "low": 16},
}
_SCENE_DOMAIN = 5
_OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What hangs behind figures and props, and where. `cells`: indices into the kind's values, row by row."""

    kind: str
    scale: str
    position: str
    height: str
    cells: tuple[int, ...]

    @property
    def units(self) -> int:
        """Units of its side."""
        rows_at_64, columns_at_64 = grid_of(self.kind, IMAGE_SIZES[0])
        return BOARD_UNITS * round((len(self.cells) / (rows_at_64 * columns_at_64)) ** 0.5)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its cells."""
        height, width = KINDS[self.kind].cell_units
        return self.units // height, self.units // width

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top in pixels."""
        factor = self.units // BOARD_UNITS
        return _LEFTS[self.scale][self.position] * factor, _TOPS[self.scale][self.height] * factor


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailScene:
    """A scene with a board in it."""

    scene: Scene
    board: Board


def grid_of(kind: str, image_size: int) -> tuple[int, int]:
    """Rows and columns of the cells of such a board in images of that size."""
    units = BOARD_UNITS * image_size // IMAGE_SIZES[0]
    height, width = KINDS[kind].cell_units
    return units // height, units // width


def hanging_positions(scale: str) -> tuple[str, ...]:
    """Where boards of that scale may hang."""
    return tuple(_LEFTS[scale])


def random_board(rng: SeededRandom, image_size: int, figure_position: str) -> Board:
    """A board of any kind, where a figure at that position hides little of it."""
    kind = rng.pick(tuple(KINDS))
    rows, columns = grid_of(kind, image_size)
    num_values = len(KINDS[kind].values)
    cells = tuple(rng.below(num_values) for _ in range(rows * columns))
    scale, position, height = random_hanging(rng, figure_position)
    return Board(kind=kind, scale=scale, position=position, height=height, cells=cells)


def random_hanging(rng: SeededRandom, figure_position: str) -> tuple[str, str, str]:
    """Scale, position and height of a board beside a figure; a large one needs a figure at a side."""
    scale = "small" if figure_position == "middle" else rng.pick(tuple(SCALES))
    height = rng.pick(HEIGHTS)
    if scale == "large":
        return scale, _OPPOSITE[figure_position], height
    return scale, rng.pick([position for position in POSITIONS if position != figure_position]), height


def random_detail_scene(rng: SeededRandom, character: Character, image_size: int = 64) -> DetailScene:
    """A character, a board, and perhaps a prop, anywhere."""
    position = rng.pick(POSITIONS)
    props = ()
    if rng.chance(40):
        props = (Prop(kind=rng.pick(PROPS), colour=rng.pick(PROP_COLOURS), position=rng.pick(POSITIONS)),)
    scene = Scene(
        place=rng.pick(PLACES),
        time=rng.pick(TIMES),
        weather=rng.pick(WEATHERS),
        figures=(Figure(character=character, position=position, action=rng.pick(ACTIONS)),),
        props=props,
    )
    return DetailScene(scene=scene, board=random_board(rng, image_size, position))


def detail_scene_at(split: str, seed: int, index: int, image_size: int = 64) -> DetailScene:
    """One random scene with a board, a pure function of its arguments."""
    rng = SeededRandom(_SCENE_DOMAIN, SPLITS.index(split), seed, index, image_size)
    return random_detail_scene(rng, random_cast(rng, split, 1)[0], image_size)


def describe_board(board: Board, *, is_known: bool = False) -> str:
    """All that text says of a board: what it is and where it hangs, never what it shows."""
    if is_known:
        return f"The {board.kind} is {board.scale} and hangs {board.height} {AT[board.position]}."
    return f"A {board.scale} {board.kind} hangs {board.height} {AT[board.position]}."


def detail_to_record(detail: DetailScene) -> dict[str, Any]:
    """The scene as a JSON object, its board beside what other scenes have."""
    board = detail.board
    return scene_to_record(detail.scene) | {
        "board": {
            "kind": board.kind,
            "scale": board.scale,
            "position": board.position,
            "height": board.height,
            "cells": list(board.cells),
        }
    }


def detail_from_record(record: Mapping[str, Any]) -> DetailScene:
    """The scene that `detail_to_record` wrote."""
    return DetailScene(scene=scene_from_record(dict(record)), board=_to_board(record["board"]))


def _to_board(record: dict[str, Any]) -> Board:
    """Raises KeyError or TypeError where it is none."""
    unknown = sorted(set(record) - {field.name for field in fields(Board)})
    if unknown:
        raise KeyError(unknown[0])
    return Board(
        kind=record["kind"],
        scale=record["scale"],
        position=record["position"],
        height=record["height"],
        cells=tuple(record["cells"]),
    )


def check_board(record: Any) -> Board:
    """The board of a record that may hold anything. Raises ValueError where it is not of this world."""
    try:
        board = _to_board(record)
        kind = KINDS[board.kind]
    except (KeyError, TypeError) as error:
        raise ValueError(f"board: {type(error).__name__}: {error}") from error
    if board.scale not in SCALES or board.position not in _LEFTS[board.scale] or board.height not in HEIGHTS:
        raise ValueError(f"board: found {board.scale} {board.height} {board.position}")
    sizes = [rows * columns for rows, columns in (grid_of(board.kind, size) for size in IMAGE_SIZES)]
    if len(board.cells) not in sizes:
        raise ValueError(f"board: cells: found {len(board.cells)}, expected {sizes[0]} or {sizes[1]}")
    for cell in board.cells:
        if type(cell) is not int or not 0 <= cell < len(kind.values):
            raise ValueError(f"board: cells: found {cell!r}, expected 0 to {len(kind.values) - 1}")
    return board
