"""A scene with a board in, its image out: (S, S, 3) uint8 with S of 64 or 128, the same bits on every
machine.

The board hangs behind figures and props, and takes the light of the time of day as the ground does. At 128
pixels backgrounds, figures and props are those of 64 pixels, each pixel four.
Letters: S pixels a side, V values of a cell, h and w pixels of a cell.
"""

from functools import cache

import numpy as np

from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE, LIGHT, background
from mm_interleaved.storyworld.detail.boards import BOARD_UNITS, KINDS, SCALES, Board, DetailScene
from mm_interleaved.storyworld.renderer import render_scene
from mm_interleaved.storyworld.sprites import glyph
from mm_interleaved.storyworld.world import GLYPHS, Scene

_QUILT_RGB = tuple((30 + 200 * (n & 1), 30 + 200 * (n >> 1 & 1), 30 + 200 * (n >> 2)) for n in range(8))
_PAPER, _INK = (250, 246, 235), (16, 12, 24)
_SKY = (16, 20, 60)
_STAR_RGB = (_SKY, (250, 250, 250), (250, 210, 40), (250, 80, 70))


def render_detail(detail: DetailScene) -> np.ndarray:
    """(S, S, 3) uint8: background, board, figure, props."""
    pixels = board_on_background(detail.scene, detail.board)
    if pixels.shape[0] == IMAGE_SIZE:
        return render_scene(detail.scene, behind=pixels)
    is_before = shows_before_background(detail.scene)
    factor = pixels.shape[0] // IMAGE_SIZE
    pixels[enlarged(is_before, factor)] = enlarged(render_scene(detail.scene), factor)[
        enlarged(is_before, factor)
    ]
    return pixels


def board_on_background(scene: Scene, board: Board) -> np.ndarray:
    """(S, S, 3) uint8: the scene without figures and props."""
    factor = board.units // BOARD_UNITS
    pixels = enlarged(background(scene.place, scene.time, scene.weather), factor)
    rows, columns = board_slices(board)
    pixels[rows, columns] = board_pixels(board, scene.time)
    return pixels


def shows_before_background(scene: Scene) -> np.ndarray:
    """(64, 64) bool: where figures, their shadows and props are drawn."""
    white, black = (np.full((IMAGE_SIZE, IMAGE_SIZE, 3), level, np.uint8) for level in (255, 0))
    return ((render_scene(scene, behind=white) != white) | (render_scene(scene, behind=black) != black)).any(
        2
    )


def visible_cells(detail: DetailScene) -> np.ndarray:
    """(cells,) bool: cells of the board of which nothing is hidden or in shadow."""
    factor = detail.board.units // BOARD_UNITS
    hidden = enlarged(shows_before_background(detail.scene), factor)[board_slices(detail.board)]
    rows, columns = detail.board.grid
    return ~hidden.reshape(rows, hidden.shape[0] // rows, columns, -1).any((1, 3)).ravel()


def board_slices(board: Board) -> tuple[slice, slice]:
    """Rows and columns of the image that a board covers."""
    left, top = board.corner
    side = board.units * SCALES[board.scale]
    return slice(top, top + side), slice(left, left + side)


def board_pixels(board: Board, time: str) -> np.ndarray:
    """(side, side, 3) uint8: the board alone."""
    stamps = stamps_of(board.kind, board.scale, time)
    rows, columns = board.grid
    cells = stamps[np.array(board.cells)].reshape(rows, columns, *stamps.shape[1:])
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * stamps.shape[1], columns * stamps.shape[2], 3)


@cache
def stamps_of(kind: str, scale: str, time: str) -> np.ndarray:
    """(V, h, w, 3) uint8: what a cell looks like with each of its values."""
    num_values, (height, width) = len(KINDS[kind].values), KINDS[kind].cell_units
    stamps = np.zeros((num_values, height, width, 3), np.int64)
    if kind == "quilt":
        stamps[:] = np.array(_QUILT_RGB)[:, None, None]
    elif kind == "poster":
        stamps[:] = _PAPER
        for stamp, name in zip(stamps, GLYPHS, strict=True):
            stamp[:-1, :-1][glyph(name)] = _INK
    else:
        stamps[:] = _SKY
        stamps[:, :2, :2] = np.array(_STAR_RGB)[:, None, None]
    lit = (stamps * np.array(LIGHT[time]) // 16).astype(np.uint8)
    result = lit.repeat(SCALES[scale], axis=1).repeat(SCALES[scale], axis=2)
    result.setflags(write=False)
    return result


def enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """A copy with each pixel `factor` by `factor` times."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
