"""Reads boards back from an image, given nothing but the image: analysis by synthesis, as the oracle.

For each way a board may hang, each cell takes its cheapest value; of all ways the one wins that explains most
of the image better than the bare background does. Figures and props are then read before that board.
Letters: S pixels a side, V values of a cell, h and w pixels of a cell.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE, background
from mm_interleaved.storyworld.detail.boards import (
    HEIGHTS,
    IMAGE_SIZES,
    KINDS,
    SCALES,
    Board,
    grid_of,
    hanging_positions,
)
from mm_interleaved.storyworld.detail.rendering import (
    board_on_background,
    board_pixels,
    board_slices,
    enlarged,
    shows_before_background,
    stamps_of,
)
from mm_interleaved.storyworld.oracle import Reading, Setting, colour_price, read_before, read_setting


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailReading:
    """What an image shows."""

    reading: Reading
    """Setting, figures and props."""
    board: Board


def read_detail(image: np.ndarray | PILImage.Image) -> DetailReading:
    """What an image of a scene with a board shows.

    Args:
        image: (S, S, 3) uint8 or a PIL image, of 64 or 128 pixels a side.

    Raises:
        ValueError: another shape or type.
    """
    pixels = to_pixels(image)
    factor = pixels.shape[0] // IMAGE_SIZE
    coarse = reduced(pixels, factor)
    board = _best_board(pixels, read_setting(coarse))
    # A large board is half of the image, and no setting is right about it nor about figures: asked again
    # beside them.
    beside = np.ones(coarse.shape[:2], bool)
    beside[tuple(slice(s.start // factor, s.stop // factor) for s in board_slices(board))] = False
    found = _read_with(pixels, coarse, board, beside)
    things = shows_before_background(found.reading.to_scene())
    return _read_with(pixels, coarse, board, beside & ~things)


def _read_with(pixels: np.ndarray, coarse: np.ndarray, hung: Board, counts: np.ndarray) -> DetailReading:
    """What an image shows, given how its board hangs and, (64, 64) bool, which pixels tell the setting."""
    setting = read_setting(coarse, counts)
    board = replace(hung, cells=tuple(read_cells(pixels, hung, setting.time).tolist()))
    behind = board_on_background(setting.to_scene(), board).astype(np.float32)
    behind = np.round(reduced(behind, pixels.shape[0] // IMAGE_SIZE)).astype(np.uint8)
    return DetailReading(reading=read_before(coarse, setting, behind), board=board)


def read_cells(pixels: np.ndarray, board: Board, time: str) -> np.ndarray:
    """(cells,) int64: the cheapest value of each cell of a board that hangs as this one does.

    Args:
        pixels: (S, S, 3) float32.
    """
    stamps = stamps_of(board.kind, board.scale, time).astype(np.float32)
    rows, columns = board.grid
    region = pixels[board_slices(board)]
    cells = region.reshape(rows, stamps.shape[1], columns, stamps.shape[2], 3).transpose(0, 2, 1, 3, 4)
    prices = ((cells[:, :, None] - stamps) ** 2).mean((3, 4, 5))
    return prices.argmin(2).ravel()


def to_pixels(image: np.ndarray | PILImage.Image) -> np.ndarray:
    """(S, S, 3) float32. Raises ValueError for another size or type."""
    array = np.asarray(image.convert("RGB")) if isinstance(image, PILImage.Image) else image
    if array.dtype != np.uint8 or array.shape not in [(size, size, 3) for size in IMAGE_SIZES]:
        raise ValueError(
            f"expected uint8 pixels of shape (64, 64, 3) or (128, 128, 3), found {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.float32)


def reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each block of `factor` by `factor` pixels."""
    size = pixels.shape[0] // factor
    return pixels.reshape(size, factor, size, factor, 3).mean((1, 3))


def _best_board(pixels: np.ndarray, setting: Setting) -> Board:
    """The board that explains most of the image; there always is one."""
    bare = background(setting.place, setting.time, setting.weather)
    unexplained = colour_price(pixels, enlarged(bare, pixels.shape[0] // IMAGE_SIZE).astype(np.float32))
    found: list[tuple[float, Board]] = []
    for empty in _hangings(pixels.shape[0]):
        board = replace(empty, cells=tuple(read_cells(pixels, empty, setting.time).tolist()))
        rows, columns = board_slices(board)
        drawn = board_pixels(board, setting.time).astype(np.float32)
        gain = unexplained[rows, columns] - colour_price(pixels[rows, columns], drawn)
        found.append((float(gain.sum()), board))
    return max(found, key=lambda pair: pair[0])[1]


def _hangings(image_size: int) -> Iterator[Board]:
    """A board for every way to hang, its cells unknown."""
    for kind in KINDS:
        rows, columns = grid_of(kind, image_size)
        for scale in SCALES:
            for position in hanging_positions(scale):
                for height in HEIGHTS:
                    yield Board(
                        kind=kind,
                        scale=scale,
                        position=position,
                        height=height,
                        cells=(0,) * (rows * columns),
                    )
