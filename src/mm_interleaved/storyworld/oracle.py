"""Reads the truth back from an image of this world, given nothing but the image.

Analysis by synthesis: every hypothesis (a background, a figure's sprite in its colours, a prop, a glyph) has
its price, the distance between the image and what the renderer would have rendered, and the cheapest wins. A
pixel's price is capped, so that what covers a part of a hypothesis does not refute it. Stages: background,
then for each position the badge plate (is somebody there, and how high), the body, the head, the glyph; last
the props.

Letters: P pixels of a region, S sprites, C colours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.storyworld import sprites
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE, background
from mm_interleaved.storyworld.renderer import (
    POSITION_X,
    figure_palette,
    prop_palette,
    render_scene,
)
from mm_interleaved.storyworld.world import (
    BADGES,
    BODY_COLOURS,
    HAT_COLOURS,
    HATS,
    PATTERNS,
    PLACES,
    POSITIONS,
    PROP_COLOURS,
    PROPS,
    SPECIES,
    TIMES,
    WEATHERS,
    Character,
    Figure,
    Prop,
    Scene,
)

# Squared distance in RGB, per pixel, beyond which a pixel speaks no more against a hypothesis: 100 levels.
_PRICE_CAP = 100.0**2
# Mean price of the bare background, where every figure's chest or face is, from which on somebody stands
# there.
_PRESENCE_PRICE = 0.35
_CORE = (slice(28, 41), slice(5, 16))
_PROP_MARGIN = 0.06

FIGURE_ATTRIBUTES = ("species", "body_colour", "pattern", "hat", "hat_colour", "action", "badge")
SETTING_ATTRIBUTES = ("place", "time", "weather")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and when an image is. `confidence` as in `FigureReading`."""

    place: str
    time: str
    weather: str
    confidence: Mapping[str, float]

    def to_scene(self) -> Scene:
        """A scene without figures and props."""
        return Scene(place=self.place, time=self.time, weather=self.weather)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureReading:
    """What stands at one position. `confidence` has for each attribute 0 (a tie) to 1 (no other fits)."""

    position: str
    species: str
    body_colour: str
    pattern: str
    hat: str
    hat_colour: str
    action: str
    badge: str
    confidence: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an image shows. `match` is 1 where the renderer draws just that, towards 0 for noise."""

    place: str
    time: str
    weather: str
    figures: tuple[FigureReading, ...]
    props: tuple[Prop, ...]
    confidence: Mapping[str, float]
    match: float

    def figure_at(self, position: str) -> FigureReading | None:
        """Who stands there."""
        return next((figure for figure in self.figures if figure.position == position), None)

    def to_scene(self, name: str = "Pip") -> Scene:
        """The scene that was read; images show no names, so all figures get the same."""
        return Scene(
            place=self.place,
            time=self.time,
            weather=self.weather,
            figures=tuple(_to_figure(figure, name) for figure in self.figures),
            props=self.props,
        )


def _to_figure(reading: FigureReading, name: str) -> Figure:
    return Figure(
        character=Character(
            name=name,
            species=reading.species,
            body_colour=reading.body_colour,
            pattern=reading.pattern,
            hat=reading.hat,
            hat_colour=reading.hat_colour,
            badge=reading.badge,
        ),
        position=reading.position,
        action=reading.action,
    )


def read_scene(image: np.ndarray | PILImage.Image) -> Reading:
    """What an image shows.

    Args:
        image: (64, 64, 3) uint8, or a PIL image of any size, which is scaled to that.

    Raises:
        ValueError: an array of another shape or type.
    """
    pixels = _to_pixels(image)
    setting = read_setting(pixels)
    return read_before(pixels, setting, background(setting.place, setting.time, setting.weather))


def read_before(pixels: np.ndarray, setting: Setting, behind: np.ndarray) -> Reading:
    """What an image shows of which setting and background are known.

    Args:
        pixels: (64, 64, 3) float32.
        behind: (64, 64, 3) uint8, what figures and props stand before.
    """
    bare = behind.astype(np.float32)
    found = (_read_figure(pixels, bare, position) for position in POSITIONS)
    figures = tuple(figure for figure in found if figure is not None)
    scene = replace(setting.to_scene(), figures=tuple(_to_figure(figure, "Pip") for figure in figures))
    with_figures = render_scene(scene, behind).astype(np.float32)
    props = tuple(
        prop for position in POSITIONS if (prop := _read_prop(pixels, with_figures, position)) is not None
    )
    drawn = render_scene(replace(scene, props=props), behind).astype(np.float32)
    return Reading(
        place=setting.place,
        time=setting.time,
        weather=setting.weather,
        figures=figures,
        props=props,
        confidence=setting.confidence,
        match=1.0 - float(colour_price(pixels, drawn).mean()),
    )


def attribute_matches(reading: Reading, truth: Scene, *, badges: bool = False) -> list[bool]:
    """For every attribute of the truth, and everything too many in the image, whether the image is right.

    Setting (3), each figure of the truth (presence at its position, species, body colour, hat, hat colour,
    action; with `badges` also pattern and badge), each prop of the truth (kind, colour); False for every
    figure or prop too many.
    """
    matches = [getattr(reading, name) == getattr(truth, name) for name in SETTING_ATTRIBUTES]
    for figure in truth.figures:
        matches += figure_matches(reading.figure_at(figure.position), figure, badges=badges)
    found_props = {prop.position: prop for prop in reading.props}
    for prop in truth.props:
        found = found_props.get(prop.position)
        matches += [
            found is not None and found.kind == prop.kind,
            found is not None and found.colour == prop.colour,
        ]
    extra = {figure.position for figure in reading.figures} - {figure.position for figure in truth.figures}
    extra_props = set(found_props) - {prop.position for prop in truth.props}
    return matches + [False] * (len(extra) + len(extra_props))


def figure_matches(found: FigureReading | None, truth: Figure, *, badges: bool = False) -> list[bool]:
    """One bool for each attribute of a figure, all False where nobody was found."""
    names = ["species", "body_colour", "hat", "hat_colour", "action"]
    if badges:
        names += ["pattern", "badge"]
    wanted = [truth.action if name == "action" else getattr(truth.character, name) for name in names]
    return [
        found is not None and getattr(found, name) == value for name, value in zip(names, wanted, strict=True)
    ]


def _to_pixels(image: np.ndarray | PILImage.Image) -> np.ndarray:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if isinstance(image, PILImage.Image):
        rgb = image.convert("RGB")
        return _to_pixels(np.asarray(rgb if rgb.size == size else rgb.resize(size, PILImage.Resampling.BOX)))
    if image.shape != (*size, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"expected uint8 pixels of shape (64, 64, 3), found {image.dtype} of shape {image.shape}"
        )
    return image.astype(np.float32)


def colour_price(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Squared RGB distance over the last axis, 0 to 1 (the cap)."""
    difference = pixels - colours
    return np.minimum(np.einsum("...c,...c->...", difference, difference), _PRICE_CAP) / _PRICE_CAP


def _margin(prices: np.ndarray) -> float:
    """How far the cheapest lies below the second cheapest, 0 to 1."""
    if len(prices) < 2:
        return 1.0
    best, second = np.partition(prices, 1)[:2]
    return float((second - best) / max(second, 1e-9))


def _cheapest(prices: Mapping[str, float]) -> tuple[str, float]:
    """The name of the lowest price and its margin."""
    values = np.array(list(prices.values()))
    return list(prices)[int(values.argmin())], _margin(values)


def _by_value(labels: Sequence[str], prices: np.ndarray) -> dict[str, float]:
    """The lowest price of each label."""
    lowest: dict[str, float] = {}
    for label, price in zip(labels, prices.tolist(), strict=True):
        lowest[label] = min(price, lowest.get(label, price))
    return lowest


@cache
def _settings() -> tuple[list[tuple[str, str, str]], np.ndarray]:
    keys = [(place, time, weather) for place in PLACES for time in TIMES for weather in WEATHERS]
    return keys, np.stack([background(*key) for key in keys]).astype(np.float32)


def read_setting(pixels: np.ndarray, counts: np.ndarray | None = None) -> Setting:
    """The setting of an image, (64, 64, 3) float32.

    Args:
        counts: (64, 64) bool, the pixels that count; default all.
    """
    keys, backgrounds = _settings()
    is_asked = np.ones(pixels.shape[:2], bool) if counts is None else counts
    prices = colour_price(pixels, backgrounds).mean((1, 2), where=is_asked)
    confidence, chosen = {}, []
    for axis, name in enumerate(SETTING_ATTRIBUTES):
        value, margin = _cheapest(_by_value([key[axis] for key in keys], prices))
        chosen.append(value)
        confidence[name] = margin
    return Setting(place=chosen[0], time=chosen[1], weather=chosen[2], confidence=confidence)


def _figure_region(pixels: np.ndarray, position: str) -> np.ndarray:
    left = POSITION_X[position] - sprites.FIGURE_CENTRE
    return pixels[: sprites.FIGURE_ROWS, left : left + sprites.FIGURE_COLUMNS]


def _read_figure(pixels: np.ndarray, bare: np.ndarray, position: str) -> FigureReading | None:
    region, behind = _figure_region(pixels, position), _figure_region(bare, position)
    lift = _read_lift(region, behind)
    if lift is None:
        return None
    actions = [action for action, its_lift in sprites.LIFT.items() if its_lift == lift]
    fixed_prices = _slot_prices(region, behind)
    body_colour, pattern, body_margins = _read_body(region, fixed_prices, actions, lift)
    head, head_margins = _read_head(region, fixed_prices, actions, body_colour, pattern)
    badge, badge_margin = _read_badge(region, lift)
    return FigureReading(
        position=position,
        body_colour=body_colour,
        pattern=pattern,
        badge=badge,
        confidence={**body_margins, **head_margins, "badge": badge_margin},
        **head,
    )


@cache
def _plate_rings() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, for no lift, of the plate's rim and of the line around it: (num_pixels, 2) each."""
    slots = sprites.figure_sprite("cat", "none", "stand", "plain")
    rim = np.argwhere(slots == sprites.PLATE)
    top, left = sprites.GLYPH_TOP, sprites.GLYPH_LEFT
    in_glyph = (
        (rim[:, 0] >= top)
        & (rim[:, 0] < top + sprites.GLYPH_ROWS)
        & (rim[:, 1] >= left)
        & (rim[:, 1] < left + sprites.GLYPH_COLUMNS)
    )
    line = [(row, column) for row in range(top - 1, top + 8) for column in (left - 2, left + 6)]
    line += [(row, column) for row in (top - 2, top + 8) for column in range(left - 1, left + 6)]
    return rim[~in_glyph], np.array(line)


def _read_lift(region: np.ndarray, behind: np.ndarray) -> int | None:
    """How far the figure is moved down, by its badge plate; None where nobody is.

    The plate's rim is the lightest and the line around it the darkest: their contrast survives a blur that
    shifts both.
    """
    if colour_price(region[_CORE], behind[_CORE]).mean() < _PRESENCE_PRICE:
        return None
    rim, line = _plate_rings()
    darkest_channel = region.min(2)
    contrast = {}
    for lift in set(sprites.LIFT.values()):
        light = darkest_channel[rim[:, 0] + lift, rim[:, 1]]
        dark = darkest_channel[line[:, 0] + lift, line[:, 1]]
        contrast[lift] = float(light.mean() - dark.mean() - (light.std() + dark.std()) / 2)
    return max(contrast, key=contrast.__getitem__)


def _slot_prices(region: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """(slots, P): the price of each fixed colour at each pixel; that of TRANSPARENT is the background's."""
    palette = figure_palette("red", "none").astype(np.float32)
    prices = colour_price(region[None], palette[:, None, None, :])
    prices[sprites.TRANSPARENT] = colour_price(region, behind)
    return prices.reshape(sprites.NUM_SLOTS, -1)


def _colour_prices(region: np.ndarray, colours: Sequence[str], is_body: bool) -> np.ndarray:
    """(C, 2, P): the prices of each colour and of its shade."""
    slots = (sprites.BODY, sprites.SHADE) if is_body else (sprites.HAT, sprites.HAT_SHADE)
    palettes = [figure_palette(*((colour, "none") if is_body else ("red", colour))) for colour in colours]
    rgb = np.stack([palette[list(slots)] for palette in palettes]).astype(np.float32)
    return colour_price(region.reshape(-1, 3), rgb[:, :, None, :])


def _read_body(
    region: np.ndarray, fixed_prices: np.ndarray, actions: Sequence[str], lift: int
) -> tuple[str, str, dict[str, float]]:
    """Body colour and pattern from below the head, where all species look alike."""
    slots_SP, labels = _body_sprites(tuple(actions), lift)
    colour_prices = _colour_prices(region, BODY_COLOURS, is_body=True)
    prices = np.stack(
        [
            _sprite_prices(slots_SP, _with_rows(fixed_prices, of_colour, sprites.BODY, sprites.SHADE))
            for of_colour in colour_prices
        ]
    )
    colour, colour_margin = _cheapest(dict(zip(BODY_COLOURS, prices.min(1).tolist(), strict=True)))
    pattern, pattern_margin = _cheapest(
        _by_value([pattern for _, pattern in labels], prices[BODY_COLOURS.index(colour)])
    )
    return colour, pattern, {"body_colour": colour_margin, "pattern": pattern_margin}


def _read_head(
    region: np.ndarray, fixed_prices: np.ndarray, actions: Sequence[str], body_colour: str, pattern: str
) -> tuple[dict[str, str], dict[str, float]]:
    """Species, hat, hat colour and action, from the whole sprite."""
    slots_SP, labels = _whole_sprites(tuple(actions), pattern)
    of_body = _colour_prices(region, (body_colour,), is_body=True)[0]
    with_body = _with_rows(fixed_prices, of_body, sprites.BODY, sprites.SHADE)
    prices_CS = np.stack(
        [
            _sprite_prices(slots_SP, _with_rows(with_body, of_hat, sprites.HAT, sprites.HAT_SHADE))
            for of_hat in _colour_prices(region, HAT_COLOURS, is_body=False)
        ]
    )
    prices = prices_CS.min(0)
    best: dict[str, str] = {}
    margins: dict[str, float] = {}
    for axis, name in enumerate(("species", "hat", "action")):
        best[name], margins[name] = _cheapest(_by_value([label[axis] for label in labels], prices))
    row = labels.index((best["species"], best["hat"], best["action"]))
    if best["hat"] == "none":
        best["hat_colour"], margins["hat_colour"] = "none", margins["hat"]
    else:
        best["hat_colour"], margins["hat_colour"] = _cheapest(
            dict(zip(HAT_COLOURS, prices_CS[:, row].tolist(), strict=True))
        )
    return best, margins


def _with_rows(prices: np.ndarray, pair: np.ndarray, colour_slot: int, shade_slot: int) -> np.ndarray:
    """The table of prices with the rows of two slots replaced."""
    result = prices.copy()
    result[colour_slot], result[shade_slot] = pair
    return result


def _sprite_prices(slots_SP: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """(S,): the mean price of each sprite, given indices into the flat table, -1 for pixels left out."""
    padded = np.append(prices.ravel(), np.float32(0))
    return np.take(padded, slots_SP).mean(1)


@cache
def _body_sprites(actions: tuple[str, ...], lift: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    labels = [(action, pattern) for action in actions for pattern in PATTERNS]
    below_head = np.arange(sprites.FIGURE_ROWS)[:, None] >= 35 + lift
    rows = [
        _table_indices(sprites.figure_sprite("cat", "none", action, pattern), below_head)
        for action, pattern in labels
    ]
    return np.stack(rows), labels


@cache
def _whole_sprites(actions: tuple[str, ...], pattern: str) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    labels = [(species, hat, action) for species in SPECIES for hat in HATS for action in actions]
    everywhere = np.ones((sprites.FIGURE_ROWS, 1), bool)
    rows = [
        _table_indices(sprites.figure_sprite(species, hat, action, pattern), everywhere)
        for species, hat, action in labels
    ]
    return np.stack(rows), labels


def _table_indices(slots: np.ndarray, used_rows: np.ndarray) -> np.ndarray:
    """(P,): where each pixel's price stands in the flat (slots, P) table; -1 for glyph and unused rows."""
    num_pixels = slots.size
    indices = slots.astype(np.int64).ravel() * num_pixels + np.arange(num_pixels)
    is_used = np.broadcast_to(used_rows, slots.shape) & (slots != sprites.PLATE)
    return np.where(is_used.ravel(), indices, -1)


def _read_badge(region: np.ndarray, lift: int) -> tuple[str, float]:
    """The glyph whose ink fits best, with the image's own black and white as the scale."""
    top, left = sprites.GLYPH_TOP + lift, sprites.GLYPH_LEFT
    cell = region[top : top + sprites.GLYPH_ROWS, left : left + sprites.GLYPH_COLUMNS].mean(2)
    rim, _ = _plate_rings()
    white = region[rim[:, 0] + lift, rim[:, 1]].mean()
    black = min(float(np.sort(cell.ravel())[:5].mean()), float(white) - 60.0)
    ink = np.clip((white - cell) / (white - black), 0, 1)
    glyphs = np.stack([sprites.glyph(badge) for badge in BADGES]).astype(np.float32)
    prices = ((ink - glyphs) ** 2).mean((1, 2))
    return _cheapest(dict(zip(BADGES, prices.tolist(), strict=True)))


def _read_prop(pixels: np.ndarray, without: np.ndarray, position: str) -> Prop | None:
    """The prop at a position; `without` is the image as it would be with no props."""
    left = POSITION_X[position] - sprites.PROP_COLUMNS // 2
    window = (
        slice(sprites.PROP_TOP, sprites.PROP_TOP + sprites.PROP_ROWS),
        slice(left, left + sprites.PROP_COLUMNS),
    )
    region, behind = pixels[window], without[window]
    bare_price = colour_price(region, behind)
    best, best_gain = None, _PROP_MARGIN
    for kind in PROPS:
        slots = sprites.prop_sprite(kind)
        is_prop = slots != sprites.TRANSPARENT
        for colour in PROP_COLOURS:
            price = colour_price(region, prop_palette(colour).astype(np.float32)[slots])
            gain = float((bare_price - price)[is_prop].sum()) / slots.size
            if gain > best_gain:
                best, best_gain = Prop(kind=kind, colour=colour, position=position), gain
    return best
