"""A scene in, its image out: (64, 64, 3) uint8, the same bits on every machine.

Drawings and backgrounds are made once and kept, so an image costs a few table look-ups.
"""

from functools import cache

import numpy as np

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld import sprites
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE, background
from mm_interleaved.storyworld.world import BODY_COLOURS, SPLITS, Figure, Prop, Scene, random_scene

POSITION_X = {"left": 12, "middle": 32, "right": 52}

BODY_RGB = {
    "red": (222, 56, 50),
    "orange": (246, 142, 36),
    "yellow": (250, 218, 66),
    "green": (72, 178, 80),
    "blue": (62, 118, 226),
    "purple": (142, 82, 192),
    "pink": (250, 156, 190),
    "grey": (152, 156, 166),
}
ITEM_RGB = {
    **{colour: BODY_RGB[colour] for colour in BODY_COLOURS},
    "white": (250, 250, 250),
    "none": (0, 0, 0),
}
_FIXED_RGB = {
    sprites.OUTLINE: (44, 34, 52),
    sprites.WHITE: (255, 252, 245),
    sprites.PINK: (244, 140, 150),
    sprites.PLATE: (255, 255, 250),
    sprites.INK: (16, 12, 24),
    sprites.BEAK: (250, 170, 40),
    sprites.BLACK: (20, 16, 28),
    sprites.MARK: (255, 255, 255),
}
_PROP_MARK = (60, 140, 60)
_SHADOW_ROWS = slice(50, 54)
_SHADOW = np.array(
    [[character == "#" for character in row] for row in (
        "....############....",
        "..################..",
        "..################..",
        "....############....",
    )]
)  # fmt: skip


def render_scene(scene: Scene, behind: np.ndarray | None = None) -> np.ndarray:
    """(64, 64, 3) uint8: background, then figures, then props.

    Args:
        behind: (64, 64, 3) uint8, what figures and props are drawn on; default the scene's background.
    """
    pixels = (background(scene.place, scene.time, scene.weather) if behind is None else behind).copy()
    for figure in scene.figures:
        _draw_figure(pixels, figure)
    for prop in scene.props:
        _draw_prop(pixels, prop)
    return pixels


def scene_at(split: str, seed: int, index: int) -> Scene:
    """One random scene, a pure function of its three numbers."""
    return random_scene(SeededRandom(1, SPLITS.index(split), seed, index), split)


def render_batch(seed: int, start: int, count: int, split: str = "train") -> np.ndarray:
    """(count, 64, 64, 3) uint8: the images of `scene_at(split, seed, start ... start + count - 1)`."""
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for offset in range(count):
        pixels[offset] = render_scene(scene_at(split, seed, start + offset))
    return pixels


def sheet_of(images: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """(height, width, 3) uint8: images (count, 64, 64, 3) row by row with white gaps, enlarged `scale`
    times.
    """
    cell = IMAGE_SIZE + 1
    rows = -(-len(images) // columns)
    sheet = np.full((rows * cell - 1, columns * cell - 1, 3), 255, np.uint8)
    for number, pixels in enumerate(images):
        top, left = number // columns * cell, number % columns * cell
        sheet[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] = pixels
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


@cache
def figure_palette(body_colour: str, hat_colour: str) -> np.ndarray:
    """(13, 3) uint8: the colour of each slot of a figure's sprite."""
    return _palette({
        sprites.BODY: BODY_RGB[body_colour],
        sprites.SHADE: _shaded(BODY_RGB[body_colour]),
        sprites.HAT: ITEM_RGB[hat_colour],
        sprites.HAT_SHADE: _shaded(ITEM_RGB[hat_colour]),
    })  # fmt: skip


@cache
def prop_palette(colour: str) -> np.ndarray:
    """(13, 3) uint8: the colour of each slot of a prop's sprite."""
    return _palette({
        sprites.HAT: ITEM_RGB[colour],
        sprites.HAT_SHADE: _shaded(ITEM_RGB[colour]),
        sprites.MARK: _PROP_MARK,
    })  # fmt: skip


def _palette(colours: dict[int, tuple[int, int, int]]) -> np.ndarray:
    palette = np.zeros((sprites.NUM_SLOTS, 3), np.uint8)
    for slot, colour in {**_FIXED_RGB, **colours}.items():
        palette[slot] = colour
    return palette


def _shaded(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = colour
    return red * 9 // 16, green * 9 // 16, blue * 9 // 16


def figure_slots(figure: Figure) -> np.ndarray:
    """(54, 20) uint8 of slots, badge included."""
    character = figure.character
    slots = sprites.figure_sprite(character.species, character.hat, figure.action, character.pattern).copy()
    top = sprites.GLYPH_TOP + sprites.LIFT[figure.action]
    plate = slots[
        top : top + sprites.GLYPH_ROWS, sprites.GLYPH_LEFT : sprites.GLYPH_LEFT + sprites.GLYPH_COLUMNS
    ]
    plate[sprites.glyph(character.badge)] = sprites.INK
    return slots


def figure_box(figure: Figure) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the figure in pixels, all included; a note or letters z do not count."""
    mask = sprites.without_mark(figure_slots(figure), figure.action)
    return _box(mask, POSITION_X[figure.position] - sprites.FIGURE_CENTRE, 0)


def badge_box(figure: Figure) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the glyph on a figure's badge in pixels, all included."""
    left = POSITION_X[figure.position] - sprites.FIGURE_CENTRE + sprites.GLYPH_LEFT
    top = sprites.GLYPH_TOP + sprites.LIFT[figure.action]
    return left, top, left + sprites.GLYPH_COLUMNS - 1, top + sprites.GLYPH_ROWS - 1


def prop_box(prop: Prop) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the prop in pixels, all included."""
    mask = sprites.prop_sprite(prop.kind) != sprites.TRANSPARENT
    return _box(mask, POSITION_X[prop.position] - sprites.PROP_COLUMNS // 2, sprites.PROP_TOP)


def _box(mask: np.ndarray, left: int, top: int) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(left + columns[0]), int(top + rows[0]), int(left + columns[-1]), int(top + rows[-1])


def _draw_figure(pixels: np.ndarray, figure: Figure) -> None:
    left = POSITION_X[figure.position] - sprites.FIGURE_CENTRE
    region = pixels[: sprites.FIGURE_ROWS, left : left + sprites.FIGURE_COLUMNS]
    under = region[_SHADOW_ROWS]
    under[_SHADOW] -= under[_SHADOW] // 4
    slots = figure_slots(figure)
    palette = figure_palette(figure.character.body_colour, figure.character.hat_colour)
    np.copyto(region, palette[slots], where=(slots != sprites.TRANSPARENT)[..., None])


def _draw_prop(pixels: np.ndarray, prop: Prop) -> None:
    left = POSITION_X[prop.position] - sprites.PROP_COLUMNS // 2
    region = pixels[
        sprites.PROP_TOP : sprites.PROP_TOP + sprites.PROP_ROWS, left : left + sprites.PROP_COLUMNS
    ]
    slots = sprites.prop_sprite(prop.kind)
    np.copyto(region, prop_palette(prop.colour)[slots], where=(slots != sprites.TRANSPARENT)[..., None])
