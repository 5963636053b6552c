"""Stories of three to six panels, each a text and the scene of its image.

A panel's text and the panels before it determine its scene: who is named is there, and nobody else; a prop is
there if it is named; place, time and weather stay until the text changes them. The look of a character is
stated when it first appears; its badge and pattern are never stated, so that only earlier images know them.
"""

from dataclasses import dataclass, replace

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.language import tell_panel
from mm_interleaved.storyworld.world import (
    ACTIONS,
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
)

_STORY_DOMAIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A text and what its image shows."""

    text: str
    scene: Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The panels in order; the first character of the cast is in every one of them."""

    cast: tuple[Character, ...]
    panels: tuple[Panel, ...]


def story(split: str, seed: int, index: int) -> Story:
    """One story, a pure function of split ("train", "validation", "test"), seed and index (from 0)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    return random_story(SeededRandom(_STORY_DOMAIN, SPLITS.index(split), seed, index), split)


def random_story(rng: SeededRandom, split: str) -> Story:
    """One random story."""
    cast = random_cast(rng, split, rng.weighted((1, 2, 3), (55, 38, 7)))
    num_panels = rng.weighted((3, 4, 5, 6), (35, 40, 15, 10))
    # When each character first comes: the hero at once, the others then or up to two panels later.
    arrivals = [0] + [rng.weighted((0, 1, 2), (60, 25, 15)) for _ in cast[1:]]
    props = [
        (kind, rng.pick(PROP_COLOURS)) for kind in rng.sample(PROPS, rng.weighted((0, 1, 2), (30, 50, 20)))
    ]

    panels: list[Panel] = []
    introduced: dict[str, Character] = {}
    known_props: set[tuple[str, str]] = set()
    previous: Scene | None = None
    for number in range(num_panels):
        present = [
            character
            for character, arrival in zip(cast, arrivals, strict=True)
            if arrival == number or (arrival < number and (character is cast[0] or rng.chance(75)))
        ]
        scene = replace(
            next_setting(rng, previous),
            figures=placed_figures(rng, present, previous),
            props=_placed_props(rng, props),
        )
        panels.append(Panel(text=tell_panel(rng, scene, previous, introduced, known_props), scene=scene))
        introduced.update((character.name, character) for character in present)
        known_props.update((prop.kind, prop.colour) for prop in scene.props)
        previous = scene
    return Story(cast=cast, panels=tuple(panels))


def next_setting(rng: SeededRandom, previous: Scene | None) -> Scene:
    """The first setting at random; later ones change seldom, and time only goes forward."""
    if previous is None:
        return Scene(place=rng.pick(PLACES), time=rng.pick(TIMES), weather=rng.pick(WEATHERS))
    others = [weather for weather in WEATHERS if weather != previous.weather]
    return Scene(
        place=rng.pick([place for place in PLACES if place != previous.place])
        if rng.chance(30)
        else previous.place,
        time=TIMES[(TIMES.index(previous.time) + 1) % len(TIMES)] if rng.chance(25) else previous.time,
        weather=rng.pick(others) if rng.chance(20) else previous.weather,
    )


def placed_figures(rng: SeededRandom, present: list[Character], previous: Scene | None) -> tuple[Figure, ...]:
    """Everybody at a place of its own; nobody does the same thing at the same place twice in a row."""
    positions = rng.sample(POSITIONS, len(present))
    before = set() if previous is None else set(previous.figures)
    figures = []
    for character, position in zip(present, positions, strict=True):
        choices = [Figure(character=character, position=position, action=action) for action in ACTIONS]
        figures.append(rng.pick([figure for figure in choices if figure not in before]))
    return tuple(figures)


def _placed_props(rng: SeededRandom, props: list[tuple[str, str]]) -> tuple[Prop, ...]:
    shown = [prop for prop in props if rng.chance(60)]
    positions = rng.sample(POSITIONS, len(shown))
    return tuple(
        Prop(kind=kind, colour=colour, position=position)
        for (kind, colour), position in zip(shown, positions, strict=True)
    )
