"""Filled shapes on a small grid of palette indices, in integer arithmetic only.

A canvas is (rows, columns) uint8 of palette slots, 0 = transparent. Coordinates are (x, y), whole pixels,
y downwards. Masks are bool arrays of the canvas's shape.
"""

import numpy as np


class Canvas:
    """A grid of palette slots on which shapes are drawn in order, each with a dark line around it."""

    def __init__(self, num_rows: int, num_columns: int, outline: int) -> None:
        self.slots = np.zeros((num_rows, num_columns), np.uint8)
        self._outline = outline
        self._y, self._x = np.mgrid[0:num_rows, 0:num_columns]

    def ellipse(self, x: int, y: int, radius_x: int, radius_y: int) -> np.ndarray:
        """Mask of the ellipse about the pixel (x, y); half a pixel more makes small ones round."""
        across = (2 * (self._x - x)) ** 2 * (2 * radius_y + 1) ** 2
        down = (2 * (self._y - y)) ** 2 * (2 * radius_x + 1) ** 2
        return across + down <= ((2 * radius_x + 1) * (2 * radius_y + 1)) ** 2

    def box(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Mask of the rectangle, all four ends included."""
        return (self._x >= left) & (self._x <= right) & (self._y >= top) & (self._y <= bottom)

    def rows(self, x: int, y: int, *lines: str) -> np.ndarray:
        """Mask drawn as text: `#` marks a pixel; the first line's first character is the pixel (x, y)."""
        mask = np.zeros(self.slots.shape, bool)
        for row, line in enumerate(lines):
            for column, character in enumerate(line):
                if character == "#" and 0 <= y + row < mask.shape[0] and 0 <= x + column < mask.shape[1]:
                    mask[y + row, x + column] = True
        return mask

    def fill(self, mask: np.ndarray, slot: int) -> None:
        """Draw without a line."""
        self.slots[mask] = slot

    def draw(self, mask: np.ndarray, slot: int) -> None:
        """Draw with a one-pixel line around the shape."""
        self.slots[grown(mask) & ~mask] = self._outline
        self.slots[mask] = slot


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its four-neighbours."""
    result = mask.copy()
    result[1:] |= mask[:-1]
    result[:-1] |= mask[1:]
    result[:, 1:] |= mask[:, :-1]
    result[:, :-1] |= mask[:, 1:]
    return result
