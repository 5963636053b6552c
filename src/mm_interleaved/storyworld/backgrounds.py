"""Places under a sky: 64 by 64 pixel backgrounds for each place, time of day and weather."""

from functools import cache

import numpy as np

from mm_interleaved.storyworld.shapes import Canvas, grown

IMAGE_SIZE = 64
HORIZON = 38

_SKIES = {  # top and bottom of the sky, red green blue
    ("day", False): ((120, 190, 245), (200, 232, 255)),
    ("day", True): ((150, 165, 185), (200, 208, 218)),
    ("evening", False): ((240, 130, 110), (255, 210, 140)),
    ("evening", True): ((170, 120, 130), (215, 170, 150)),
    ("night", False): ((20, 24, 66), (52, 58, 118)),
    ("night", True): ((38, 42, 62), (66, 70, 92)),
}
_GROUNDS = {
    "meadow": (124, 196, 92),
    "beach": (244, 222, 160),
    "forest": (84, 138, 76),
    "town": (176, 172, 180),
    "desert": (226, 158, 88),
    "mountain": (150, 178, 168),
}
LIGHT = {"day": (16, 16, 16), "evening": (16, 12, 11), "night": (6, 7, 10)}
"""Sixteenths of red, green and blue that are left at that time of day."""


@cache
def background(place: str, time: str, weather: str) -> np.ndarray:
    """(64, 64, 3) uint8, read-only."""
    pixels = _sky(time, weather)
    _draw_lights(pixels, time, weather)
    land = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.int64)
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for mask, colour in _land(place):
        land[mask] = colour
        covered |= mask
    land = land * np.array(LIGHT[time]) // 16
    pixels = np.where(covered[..., None], land, pixels)
    if place == "town" and time == "night":
        pixels[_town_windows()] = (255, 225, 120)
    _draw_weather(pixels, weather, time)
    result = pixels.astype(np.uint8)
    result.setflags(write=False)
    return result


@cache
def land_mask(place: str) -> np.ndarray:
    """(64, 64) uint8: 0 sky, 1 ground, 2 what stands on the horizon."""
    result = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for mask, _ in _land(place):
        result[mask] = 2
    result[HORIZON:] = 1
    return result


def _canvas() -> Canvas:
    return Canvas(IMAGE_SIZE, IMAGE_SIZE, 0)


def _sky(time: str, weather: str) -> np.ndarray:
    top, bottom = (np.array(colour) for colour in _SKIES[time, weather != "clear"])
    # Bands of four rows: a gradient that a small decoder can draw.
    step = np.arange(IMAGE_SIZE).clip(max=HORIZON) // 4 * 4
    rows = top + (bottom - top) * step[:, None] // HORIZON
    return np.repeat(rows[:, None, :], IMAGE_SIZE, axis=1)


def _draw_lights(pixels: np.ndarray, time: str, weather: str) -> None:
    if weather != "clear":
        return
    canvas = _canvas()
    if time == "day":
        pixels[canvas.ellipse(22, 7, 5, 5)] = (255, 240, 160)
        pixels[canvas.ellipse(22, 7, 4, 4)] = (255, 215, 70)
    elif time == "evening":
        pixels[canvas.ellipse(22, 29, 7, 7)] = (255, 225, 150)
        pixels[canvas.ellipse(22, 29, 5, 5)] = (255, 245, 200)
    else:
        moon = canvas.ellipse(22, 7, 5, 5) & ~canvas.ellipse(25, 5, 4, 4)
        pixels[moon] = (250, 245, 205)
        for x, y in (
            (3, 4),
            (12, 12),
            (33, 3),
            (41, 10),
            (50, 4),
            (59, 12),
            (6, 24),
            (42, 24),
            (61, 27),
            (22, 22),
        ):
            pixels[canvas.rows(x - 1, y - 1, ".#.", "###", ".#.")] = (235, 235, 190)


def _draw_weather(pixels: np.ndarray, weather: str, time: str) -> None:
    if weather == "clear":
        return
    canvas = _canvas()
    clouds = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for x, y in ((9, 6), (31, 5), (53, 7)):
        clouds |= (
            canvas.ellipse(x, y, 6, 3)
            | canvas.ellipse(x - 5, y + 2, 4, 2)
            | canvas.ellipse(x + 5, y + 1, 4, 3)
        )
    bright = {"cloudy": 250, "rainy": 140, "snowy": 215}[weather]
    shade = np.array((bright, bright, min(bright + 10, 255)))
    pixels[clouds] = shade * {"day": 16, "evening": 14, "night": 9}[time] // 16
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    if weather == "rainy":
        streaks = ((x * 2 + y) % 16 < 2) & ((y + x * 5) % 12 < 7) & (y > 10)
        pixels[streaks] = (120, 160, 230)
    elif weather == "snowy":
        flakes = (y % 8 < 2) & ((x + y // 8 * 5) % 10 < 2) & (y > 10)
        pixels[flakes] = (255, 255, 255)


def _land(place: str) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Masks and daylight colours, drawn in order."""
    canvas = _canvas()
    ground = canvas.box(0, HORIZON, IMAGE_SIZE - 1, IMAGE_SIZE - 1)
    return [*_BACKDROPS[place](canvas), (ground, _GROUNDS[place]), *_GROUND_MARKS[place](canvas)]


def _meadow(canvas: Canvas):
    return [
        (canvas.ellipse(12, 44, 24, 15), (150, 212, 120)),
        (canvas.ellipse(52, 44, 22, 12), (104, 180, 88)),
    ]


def _beach(canvas: Canvas):
    waves = canvas.rows(
        0,
        31,
        *(
            [
                "####....####....####....####....####....####....####....####....",
                "." * 64,
                "." * 64,
                "....####....####....####....####....####....####....####....####",
            ]
        ),
    )
    return [
        (canvas.box(0, 27, 63, HORIZON), (50, 130, 200)),
        (waves, (150, 205, 240)),
        (canvas.box(0, 36, 63, HORIZON), (225, 240, 245)),
    ]


def _forest(canvas: Canvas):
    parts = []
    for x, top in ((1, 14), (21, 10), (43, 12), (62, 15), (11, 18), (32, 17), (53, 18)):
        parts.append((canvas.box(x - 1, 30, x + 1, HORIZON), (104, 72, 48)))
        crown = canvas.ellipse(x, top + 9, 6, 10)
        parts.append((grown(crown), (28, 74, 44)))
        parts.append((crown, (48, 116, 66)))
    return parts


def _town(canvas: Canvas):
    parts = []
    for left, top, colour in (
        (-4, 20, (214, 120, 96)),
        (15, 15, (236, 206, 150)),
        (36, 18, (150, 160, 204)),
        (56, 14, (206, 150, 170)),
    ):
        parts.append((canvas.box(left, top, left + 14, HORIZON), colour))
        roof = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        for row in range(6):
            roof |= canvas.box(left + row - 1, top - 1 - row, left + 15 - row, top - 1 - row)
        parts.append((roof, (130, 66, 60)))
    parts.append((_town_windows(), (90, 110, 140)))
    return parts


def _town_windows() -> np.ndarray:
    canvas = _canvas()
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for left, top in ((-4, 20), (15, 15), (36, 18), (56, 14)):
        for x in (left + 2, left + 9):
            for y in (top + 3, top + 10):
                mask |= canvas.box(x, y, x + 3, y + 3)
    return mask


def _desert(canvas: Canvas):
    parts = [
        (canvas.ellipse(40, 46, 30, 14), (240, 184, 116)),
        (canvas.ellipse(2, 46, 22, 12), (210, 140, 76)),
    ]
    for x, top in ((21, 20), (44, 22)):
        cactus = canvas.box(x, top, x + 2, HORIZON + 1) | canvas.box(x - 4, top + 4, x - 3, top + 8)
        cactus |= canvas.box(x - 4, top + 8, x + 6, top + 9) | canvas.box(x + 5, top + 2, x + 6, top + 8)
        parts.append((grown(cactus), (40, 92, 58)))
        parts.append((cactus, (88, 160, 88)))
    return parts


def _mountain(canvas: Canvas):
    parts = []
    for peak, top, colour in ((8, 14, (116, 122, 142)), (54, 12, (104, 112, 136)), (32, 8, (134, 140, 158))):
        for row in range(top, HORIZON + 1):
            half = (row - top) * 3 // 4
            parts.append(
                (canvas.box(peak - half, row, peak + half, row), (250, 252, 255) if row < top + 7 else colour)
            )
    return parts


def _tufts(canvas: Canvas, colour: tuple[int, int, int], *rows: str):
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for x, y in ((2, 42), (21, 45), (42, 43), (60, 46), (21, 57), (41, 59), (1, 60), (60, 55)):
        mask |= canvas.rows(x, y, *rows)
    return [(mask, colour)]


_BACKDROPS = {
    "meadow": _meadow,
    "beach": _beach,
    "forest": _forest,
    "town": _town,
    "desert": _desert,
    "mountain": _mountain,
}
_GROUND_MARKS = {
    "meadow": lambda canvas: _tufts(canvas, (255, 240, 150), "##", "##"),
    "beach": lambda canvas: _tufts(canvas, (232, 150, 140), ".#.", "###"),
    "forest": lambda canvas: _tufts(canvas, (52, 100, 52), "#.#", "###"),
    "town": lambda canvas: [(canvas.box(0, HORIZON, 63, HORIZON + 1), (120, 116, 126))],
    "desert": lambda canvas: _tufts(canvas, (200, 130, 66), "####"),
    "mountain": lambda canvas: _tufts(canvas, (112, 120, 122), ".##.", "####"),
}
