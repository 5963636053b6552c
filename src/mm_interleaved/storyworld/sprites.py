"""The drawings of characters and props: grids of palette slots, coloured later by the renderer.

A figure's sprite is as high as the image above the foreground, so its row is the image's row and only its
column depends on the position. The three positions, and the heights of standing, jumping and sitting figures,
differ by multiples of four pixels: a badge always lies in the same way on the latent grid of a factor-four
VAE.
"""

from functools import cache

import numpy as np

from mm_interleaved.storyworld.shapes import Canvas
from mm_interleaved.storyworld.world import GLYPHS

TRANSPARENT, OUTLINE, BODY, SHADE, WHITE, PINK, HAT, HAT_SHADE, PLATE, INK, BEAK, BLACK, MARK = range(13)
NUM_SLOTS = 13

FIGURE_ROWS, FIGURE_COLUMNS = 54, 20
FIGURE_CENTRE = 10
PROP_ROWS, PROP_COLUMNS = 11, 11
PROP_TOP = 53

# Row of the glyph's first pixel for a standing figure; its first column in the sprite; how far an action
# moves it.
GLYPH_TOP, GLYPH_LEFT = 36, 8
GLYPH_ROWS, GLYPH_COLUMNS = 7, 5
LIFT = {"stand": 0, "wave": 0, "sing": 0, "jump": -8, "sit": 4, "sleep": 4}


@cache
def glyph(badge: str) -> np.ndarray:
    """(7, 5) bool, True where the badge is inked."""
    return np.array([[mark == "#" for mark in row] for row in GLYPHS[badge].split()])


@cache
def figure_sprite(species: str, hat: str, action: str, pattern: str) -> np.ndarray:
    """(54, 20) uint8 of slots: the whole figure with an empty badge plate."""
    lift = LIFT[action]
    canvas = Canvas(FIGURE_ROWS, FIGURE_COLUMNS, OUTLINE)
    _draw_body(canvas, action, lift)
    _draw_head(canvas, species, lift)
    _draw_arms(canvas, action, lift)
    _lay_pattern(canvas, pattern, lift)
    _draw_plate(canvas, lift)
    _draw_face(canvas, species, action, lift)
    _draw_hat(canvas, hat, lift)
    _draw_mark(canvas, action)
    canvas.slots.setflags(write=False)
    return canvas.slots


def without_mark(slots: np.ndarray, action: str) -> np.ndarray:
    """(54, 20) bool: where the figure itself is, without a note or the letters z above it."""
    is_figure = slots != TRANSPARENT
    if action in ("sing", "sleep"):
        mark_canvas = Canvas(FIGURE_ROWS, FIGURE_COLUMNS, OUTLINE)
        _draw_mark(mark_canvas, action)
        is_figure &= mark_canvas.slots == TRANSPARENT
    return is_figure


@cache
def prop_sprite(kind: str) -> np.ndarray:
    """(11, 11) uint8 of slots; HAT and HAT_SHADE stand for the prop's own colour."""
    canvas = Canvas(PROP_ROWS, PROP_COLUMNS, OUTLINE)
    _PROP_DRAWINGS[kind](canvas)
    canvas.slots.setflags(write=False)
    return canvas.slots


def _draw_body(canvas: Canvas, action: str, lift: int) -> None:
    if action in ("sit", "sleep"):
        for x in (4, 16):
            canvas.draw(canvas.ellipse(x, 47 + lift, 2, 2), BODY)
            canvas.fill(canvas.ellipse(x, 47 + lift, 1, 1), PINK)
        canvas.draw(canvas.ellipse(10, 40 + lift, 6, 9), BODY)
        for x in (4, 16):
            canvas.draw(canvas.ellipse(x, 47 + lift, 2, 2), BODY)
            canvas.fill(canvas.ellipse(x, 47 + lift, 1, 1), PINK)
        return
    spread = 1 if action == "jump" else 0
    for x in (7 - spread, 13 + spread):
        canvas.draw(canvas.ellipse(x, 49 + lift, 3, 2), BODY)
    canvas.draw(canvas.ellipse(10, 40 + lift, 6, 8), BODY)


def _draw_arms(canvas: Canvas, action: str, lift: int) -> None:
    raised = {"wave": (False, True), "jump": (True, True)}.get(action, (False, False))
    for is_raised, x in zip(raised, (3, 17), strict=True):
        if is_raised:
            canvas.draw(canvas.box(x, 31 + lift, x, 37 + lift) | canvas.ellipse(x, 30 + lift, 2, 2), BODY)
        else:
            canvas.draw(canvas.ellipse(x, 39 + lift, 1, 3), BODY)


def _draw_head(canvas: Canvas, species: str, lift: int) -> None:
    """The round head with the species' ears: behind it, or in front of it."""
    if species in _EARS_BEHIND:
        _EARS_BEHIND[species](canvas, lift)
    canvas.draw(canvas.ellipse(10, 27 + lift, 7, 6), BODY)
    if species in _EARS_BEFORE:
        _EARS_BEFORE[species](canvas, lift)


def _draw_cat_ears(canvas: Canvas, lift: int) -> None:
    left = ("#....", "##...", "###..", "####.", "#####", "#####", "#####")
    right = tuple(row[::-1] for row in left)
    canvas.draw(canvas.rows(3, 15 + lift, *left), BODY)
    canvas.draw(canvas.rows(13, 15 + lift, *right), BODY)
    canvas.fill(canvas.rows(4, 18 + lift, "#..", "##.", "###"), PINK)
    canvas.fill(canvas.rows(14, 18 + lift, "..#", ".##", "###"), PINK)


def _draw_rabbit_ears(canvas: Canvas, lift: int) -> None:
    for x in (5, 15):
        canvas.draw(canvas.ellipse(x, 14 + lift, 2, 6), BODY)
        canvas.fill(canvas.ellipse(x, 14 + lift, 0, 4), PINK)


def _draw_bear_ears(canvas: Canvas, lift: int) -> None:
    for x in (4, 16):
        canvas.draw(canvas.ellipse(x, 20 + lift, 2, 2), BODY)
        canvas.fill(canvas.ellipse(x, 20 + lift, 1, 1), SHADE)


def _draw_mouse_ears(canvas: Canvas, lift: int) -> None:
    for x in (4, 16):
        canvas.draw(canvas.ellipse(x, 18 + lift, 3, 4), BODY)
        canvas.fill(canvas.ellipse(x, 18 + lift, 2, 2), PINK)


def _draw_pig_ears(canvas: Canvas, lift: int) -> None:
    canvas.draw(canvas.rows(3, 17 + lift, "##...", "####.", "#####", "#####", "#####"), BODY)
    canvas.draw(canvas.rows(13, 17 + lift, "...##", ".####", "#####", "#####", "#####"), BODY)


def _draw_frog_eyelids(canvas: Canvas, lift: int) -> None:
    for x in (5, 15):
        canvas.draw(canvas.ellipse(x, 21 + lift, 2, 3), BODY)


def _draw_dog_ears(canvas: Canvas, lift: int) -> None:
    for x in (3, 17):
        canvas.draw(canvas.ellipse(x, 26 + lift, 1, 5), SHADE)


def _draw_duck_tuft(canvas: Canvas, lift: int) -> None:
    canvas.draw(canvas.rows(8, 17 + lift, "..#..", ".##.#", ".####", "..###"), BODY)


_EARS_BEHIND = {
    "cat": _draw_cat_ears,
    "rabbit": _draw_rabbit_ears,
    "bear": _draw_bear_ears,
    "mouse": _draw_mouse_ears,
    "pig": _draw_pig_ears,
}
_EARS_BEFORE = {"frog": _draw_frog_eyelids, "dog": _draw_dog_ears, "duck": _draw_duck_tuft}

# Two by two pixels each, where body, arms, feet and forehead of a standing figure are.
_SPOT_CENTRES = (
    (6, 19), (14, 20), (10, 22), (3, 23), (17, 23), (6, 15), (15, 14), (3, 38), (17, 40), (5, 42), (15, 37),
    (6, 47), (13, 46), (10, 46), (7, 50), (14, 50), (3, 46), (17, 48),
)  # fmt: skip


def _lay_pattern(canvas: Canvas, pattern: str, lift: int) -> None:
    row, column = np.mgrid[0:FIGURE_ROWS, 0:FIGURE_COLUMNS]
    row = row - lift
    if pattern == "striped":
        marks = row % 4 < 2
    elif pattern == "spotted":
        marks = np.zeros(canvas.slots.shape, bool)
        for x, y in _SPOT_CENTRES:
            marks |= canvas.box(x - 1, y + lift, x, y + 1 + lift)
    elif pattern == "checked":
        marks = (column // 2 + row // 2) % 2 == 0
    else:
        return
    # The face stays plain, so that its expression can be read.
    is_face = canvas.ellipse(10, 29 + lift, 7, 6)
    canvas.fill(marks & (canvas.slots == BODY) & ~is_face, WHITE if pattern == "spotted" else SHADE)


def _draw_plate(canvas: Canvas, lift: int) -> None:
    canvas.draw(canvas.box(7, GLYPH_TOP - 1 + lift, 13, GLYPH_TOP + 7 + lift), PLATE)


def _draw_face(canvas: Canvas, species: str, action: str, lift: int) -> None:
    top = lift
    eye_y = 21 if species == "frog" else 26
    eye_x = (5, 15) if species == "frog" else (7, 13)
    for x in eye_x:
        if action == "sleep":
            canvas.fill(canvas.rows(x - 1, eye_y + top, "#.#", ".#."), BLACK)
        else:
            canvas.fill(canvas.rows(x - 1, eye_y - 1 + top, "###", "###", "###"), BLACK)
            canvas.fill(canvas.rows(x - 1, eye_y - 1 + top, "#"), WHITE)
    if species == "duck":
        canvas.draw(canvas.ellipse(10, 30 + top, 3, 1), BEAK)
    elif species == "pig":
        canvas.draw(canvas.ellipse(10, 30 + top, 3, 1), PINK)
        canvas.fill(canvas.rows(9, 30 + top, "#.#"), BLACK)
    elif species == "frog":
        canvas.fill(canvas.rows(5, 28 + top, "#.........#", ".#.......#.", "..#######.."), BLACK)
    else:
        canvas.fill(canvas.ellipse(10, 30 + top, 3, 2), WHITE)
        nose = PINK if species in ("cat", "rabbit", "mouse") else BLACK
        canvas.fill(canvas.rows(9, 28 + top, "###", ".#."), nose)
        if species == "rabbit":
            canvas.fill(canvas.rows(9, 31 + top, "#.#", "#.#"), BLACK)
        else:
            canvas.fill(canvas.rows(8, 30 + top, "..#..", "##.##"), BLACK)
    if action == "sing":
        canvas.draw(canvas.ellipse(10, 31 + top, 1, 1), PINK)


def _draw_hat(canvas: Canvas, hat: str, lift: int) -> None:
    top = lift
    if hat == "cap":
        canvas.draw(
            canvas.rows(6, 16 + top, "..#####..", ".#######.", "#########", "#########", "#########"), HAT
        )
        canvas.draw(canvas.box(10, 21 + top, 17, 22 + top), HAT_SHADE)
    elif hat == "crown":
        rows = ("#...#...#", "#..###..#", "##.###.##", "#########", "#########", "#########")
        canvas.draw(canvas.rows(6, 16 + top, *rows), HAT)
        canvas.fill(canvas.rows(7, 20 + top, "#..#..#"), WHITE)
    elif hat == "top hat":
        canvas.draw(canvas.box(7, 12 + top, 13, 19 + top), HAT)
        canvas.draw(canvas.box(5, 20 + top, 15, 21 + top), HAT)
        canvas.fill(canvas.box(7, 17 + top, 13, 18 + top), HAT_SHADE)
    elif hat == "party hat":
        rows = (
            "....#....",
            "...###...",
            "...###...",
            "..#####..",
            "..#####..",
            ".#######.",
            ".#######.",
            "#########",
            "#########",
        )
        canvas.draw(canvas.rows(6, 13 + top, *rows), HAT)
        canvas.fill(
            canvas.rows(
                6, 15 + top, ".........", "....##...", "......#..", "..##.....", "....##...", ".......#."
            ),
            HAT_SHADE,
        )
        canvas.draw(canvas.ellipse(10, 12 + top, 1, 1), WHITE)


def _draw_mark(canvas: Canvas, action: str) -> None:
    """Letters z over a sleeper, a note over a singer."""
    if action == "sleep":
        canvas.draw(canvas.rows(12, 9, "#####", "...#.", "..#..", ".#...", "#####"), MARK)
        canvas.draw(canvas.rows(15, 2, "####", "..#.", ".#..", "####"), MARK)
    elif action == "sing":
        canvas.draw(canvas.rows(13, 2, "..####", "..####", "..#..#", "..#..#", "###.##", "###.##"), MARK)


def _draw_ball(canvas: Canvas) -> None:
    canvas.draw(canvas.ellipse(5, 5, 4, 4), HAT)
    canvas.fill(canvas.rows(2, 2, "..#..", ".#...", "#...."), WHITE)
    canvas.fill(canvas.rows(4, 7, "...#", "###."), HAT_SHADE)


def _draw_box(canvas: Canvas) -> None:
    canvas.draw(canvas.box(1, 3, 9, 9), HAT)
    canvas.fill(canvas.box(1, 5, 9, 5), HAT_SHADE)
    canvas.fill(canvas.box(5, 3, 5, 9), WHITE)
    canvas.draw(canvas.rows(3, 1, "##.##"), WHITE)


def _draw_flower(canvas: Canvas) -> None:
    canvas.draw(canvas.box(5, 7, 5, 10), MARK)
    petals = canvas.ellipse(5, 2, 1, 1) | canvas.ellipse(2, 4, 1, 1) | canvas.ellipse(8, 4, 1, 1)
    canvas.draw(petals | canvas.ellipse(3, 7, 1, 1) | canvas.ellipse(7, 7, 1, 1), HAT)
    canvas.fill(canvas.ellipse(5, 5, 1, 1), BEAK)


def _draw_cup(canvas: Canvas) -> None:
    canvas.draw(canvas.rows(6, 4, "####", "...#", "...#", "####"), HAT_SHADE)
    canvas.draw(
        canvas.rows(
            1, 2, "#######", "#######", "#######", "#######", "#######", "#######", ".#####.", ".#####."
        ),
        HAT,
    )
    canvas.fill(canvas.box(1, 2, 7, 2), WHITE)


def _draw_lamp(canvas: Canvas) -> None:
    canvas.draw(canvas.box(5, 6, 5, 9), BLACK)
    canvas.draw(canvas.box(2, 9, 8, 9), HAT_SHADE)
    canvas.draw(canvas.rows(1, 1, "...###...", "..#####..", "..#####..", ".#######.", "#########"), HAT)
    canvas.fill(canvas.rows(3, 5, "#####", ".###."), BEAK)


def _draw_book(canvas: Canvas) -> None:
    canvas.draw(canvas.box(1, 1, 9, 9), HAT)
    canvas.fill(canvas.box(1, 1, 2, 9), HAT_SHADE)
    canvas.fill(canvas.box(3, 8, 9, 9), WHITE)
    canvas.fill(canvas.box(4, 3, 8, 5), WHITE)
    canvas.fill(canvas.box(5, 4, 7, 4), BLACK)


_PROP_DRAWINGS = {
    "ball": _draw_ball,
    "box": _draw_box,
    "flower": _draw_flower,
    "cup": _draw_cup,
    "lamp": _draw_lamp,
    "book": _draw_book,
}
