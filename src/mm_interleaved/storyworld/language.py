"""Scenes as sentences: the small, regular English of StoryWorld, and its reading back.

`describe_*` and `tell_*` write; `read_*` find the same facts in any text, sentence by sentence, and ignore
what they do not know. Badges and patterns are never written: only the images carry them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.world import (
    ACTIONS,
    BODY_COLOURS,
    HAT_COLOURS,
    HATS,
    NAMES,
    PLACES,
    POSITIONS,
    PROPS,
    SPECIES,
    TIMES,
    WEATHERS,
    Character,
    Figure,
    Prop,
    Scene,
)

WHERE = {
    "meadow": "in the meadow",
    "beach": "at the beach",
    "forest": "in the forest",
    "town": "in the town",
    "desert": "in the desert",
    "mountain": "on the mountain",
}
AT = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
DOES = {
    "stand": "stands",
    "wave": "waves",
    "jump": "jumps",
    "sit": "sits",
    "sleep": "sleeps",
    "sing": "sings",
}
COUNTS = ("none", "one", "two", "three")


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(words: str) -> str:
    """The words with a capital and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def look(character: Character) -> str:
    """What text may say of somebody: `red cat with a blue cap`."""
    hat = (
        "without a hat"
        if character.hat == "none"
        else f"with {with_article(f'{character.hat_colour} {character.hat}')}"
    )
    return f"{character.body_colour} {character.species} {hat}"


def describe_setting(scene: Scene) -> str:
    """`It is a rainy night at the beach.`"""
    return f"It is a {scene.weather} {scene.time} {WHERE[scene.place]}."


def describe_figure(figure: Figure) -> str:
    """`A red cat with a blue cap waves on the left.`"""
    return sentence(f"{with_article(look(figure.character))} {DOES[figure.action]} {AT[figure.position]}")


def describe_prop(prop: Prop) -> str:
    """`A red ball is in the middle.`"""
    return sentence(f"{with_article(f'{prop.colour} {prop.kind}')} is {AT[prop.position]}")


def describe_scene(scene: Scene) -> str:
    """All that can be seen but badges and patterns: figures and props from left to right, setting."""
    lines = [describe_figure(figure) for figure in from_left(scene.figures)]
    lines += [describe_prop(prop) for prop in from_left(scene.props)]
    return " ".join([*lines, describe_setting(scene)])


def describe_relations(scene: Scene) -> str:
    """How many there are, and who is next to whom: what a paragraph says after the description."""
    figures, props = from_left(scene.figures), from_left(scene.props)
    lines = [count_sentence(len(figures), "animal")]
    for one, other in pairwise(figures):
        lines.append(f"The {one.character.species} is to the left of the {other.character.species}.")
    behind = {figure.position: figure for figure in figures}
    for prop in props:
        if prop.position in behind:
            lines.append(f"The {prop.kind} is in front of the {behind[prop.position].character.species}.")
    return " ".join(lines)


def count_sentence(count: int, noun: str) -> str:
    """`There is one animal.`, `There are two animals.`"""
    return f"There {'is' if count == 1 else 'are'} {COUNTS[count]} {noun}{'' if count == 1 else 's'}."


def from_left(things: Iterable[Any]) -> list[Any]:
    """Figures or props in the order of their positions, from left to right."""
    return sorted(things, key=lambda thing: POSITIONS.index(thing.position))


def tell_panel(
    rng: SeededRandom,
    scene: Scene,
    previous: Scene | None,
    introduced: Mapping[str, Character],
    props: set[Any],
) -> str:
    """The text of one panel: what is new against the previous one, and where everybody is.

    Args:
        previous: the scene of the panel before, None for the first.
        introduced: characters that earlier panels have described, by name.
        props: (kind, colour) of the props that earlier panels have described.
    """
    new = [figure.character for figure in scene.figures if figure.character.name not in introduced]
    lines = [_tell_setting(scene, previous)]
    lines += [_introduce(rng, character) for character in new]
    lines.append(_tell_actions(rng, from_left(scene.figures)))
    lines += [_tell_prop(rng, prop, (prop.kind, prop.colour) in props) for prop in from_left(scene.props)]
    if previous is None:
        # The first panel begins with its hero; the place follows.
        lines = [*lines[1:2], lines[0], *lines[2:]]
    return " ".join(line for line in lines if line)


def _introduce(rng: SeededRandom, character: Character) -> str:
    opening = rng.pick(("{name} is {look}.", "Here is {name}, {look}.", "Meet {name}, {look}."))
    return opening.format(name=character.name, look=with_article(look(character)))


def _tell_setting(scene: Scene, previous: Scene | None) -> str:
    if previous is None:
        return describe_setting(scene)
    words = []
    if scene.place != previous.place:
        names = [figure.character.name for figure in from_left(scene.figures)]
        words.append(f"{_listed(names)} {'goes' if len(names) == 1 else 'go'} to the {scene.place}.")
    if scene.time != previous.time and scene.weather != previous.weather:
        words.append(f"Now it is a {scene.weather} {scene.time}.")
    elif scene.time != previous.time:
        words.append(f"Now it is {scene.time}.")
    elif scene.weather != previous.weather:
        words.append(f"Now it is {scene.weather}.")
    return " ".join(words)


def _tell_actions(rng: SeededRandom, figures: list[Figure]) -> str:
    if len(figures) == 1 and rng.chance(40):
        figure = figures[0]
        return sentence(f"{AT[figure.position]}, {figure.character.name} {DOES[figure.action]}")
    clauses = [f"{figure.character.name} {DOES[figure.action]} {AT[figure.position]}" for figure in figures]
    return sentence(_listed(clauses))


def _tell_prop(rng: SeededRandom, prop: Prop, is_known: bool) -> str:
    if is_known:
        return f"The {prop.kind} is {AT[prop.position]}."
    words = with_article(f"{prop.colour} {prop.kind}")
    return sentence(
        f"{words} is {AT[prop.position]}" if rng.chance(50) else f"there is {words} {AT[prop.position]}"
    )


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one clause says of one figure or prop; None where it says nothing."""

    subject: str
    """A name, a species or a kind of prop."""
    colour: str | None = None
    hat: str | None = None
    hat_colour: str | None = None
    action: str | None = None
    position: str | None = None


def _any_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_ACTION_OF = {third: action for action, third in DOES.items()}
_POSITION_AT = {at: position for position, at in AT.items()}
_COLOURS = tuple(dict.fromkeys((*BODY_COLOURS, *HAT_COLOURS)))
_REAL_HATS = [hat for hat in HATS if hat != "none"]
_LOOK = (
    rf"an? (?P<colour>{_any_of(_COLOURS)}) (?P<species>{_any_of(SPECIES)}) "
    rf"(?:with an? (?P<hat_colour>{_any_of(_COLOURS)}) (?P<hat>{_any_of(_REAL_HATS)})|without a hat)"
)
_FIGURE = re.compile(
    rf"\b{_LOOK} (?P<does>{_any_of(_ACTION_OF)}) (?P<at>{_any_of(_POSITION_AT)})", re.IGNORECASE
)
_INTRODUCTION = re.compile(rf"\b(?P<name>{_any_of(NAMES)})(?: is|,) {_LOOK}")
_NAMED = re.compile(
    rf"\b(?P<name>{_any_of(NAMES)}) (?P<does>{_any_of(_ACTION_OF)}) (?P<at>{_any_of(_POSITION_AT)})"
)
_NAMED_AFTER = re.compile(
    # At the start of a sentence only: in "A waves on the left, B sits ..." the place is A's.
    rf"(?:^|(?<=\. ))(?P<at>{_any_of(_POSITION_AT)}), "
    rf"(?P<name>{_any_of(NAMES)}) (?P<does>{_any_of(_ACTION_OF)})",
    re.IGNORECASE,
)
_PROP = re.compile(
    rf"\b(?:an?|the)(?: (?P<colour>{_any_of(_COLOURS)}))? (?P<kind>{_any_of(PROPS)})(?: is)? "
    rf"(?P<at>{_any_of(_POSITION_AT)})",
    re.IGNORECASE,
)


def read_figures(text: str) -> list[Said]:
    """Figures described by their look, as captions do."""
    return [
        Said(
            subject=match["species"].lower(),
            colour=match["colour"].lower(),
            hat=(match["hat"] or "none").lower(),
            hat_colour=(match["hat_colour"] or "none").lower(),
            action=_ACTION_OF[match["does"].lower()],
            position=_POSITION_AT[match["at"].lower()],
        )
        for match in _FIGURE.finditer(text)
    ]


def read_props(text: str) -> list[Said]:
    """Props, each with its position; the colour is None where the text does not repeat it."""
    return [
        Said(
            subject=match["kind"].lower(),
            colour=match["colour"].lower() if match["colour"] else None,
            position=_POSITION_AT[match["at"].lower()],
        )
        for match in _PROP.finditer(text)
    ]


def read_setting(text: str) -> dict[str, str]:
    """Place, time and weather, as far as the text names them; the last mention of each counts."""
    found = {}
    for key, words in (("place", PLACES), ("time", TIMES), ("weather", WEATHERS)):
        matches = re.findall(rf"\b{_any_of(words)}\b", text, re.IGNORECASE)
        if matches:
            found[key] = matches[-1].lower()
    return found


def read_introductions(text: str) -> dict[str, Said]:
    """By name: the look of those whom the text introduces."""
    return {
        match["name"]: Said(
            subject=match["species"].lower(),
            colour=match["colour"].lower(),
            hat=(match["hat"] or "none").lower(),
            hat_colour=(match["hat_colour"] or "none").lower(),
        )
        for match in _INTRODUCTION.finditer(text)
    }


def read_actions(text: str) -> dict[str, Said]:
    """By name: the action and position of those whom a story's panel mentions."""
    return {
        match["name"]: Said(
            subject=match["name"],
            action=_ACTION_OF[match["does"].lower()],
            position=_POSITION_AT[match["at"].lower()],
        )
        for pattern in (_NAMED, _NAMED_AFTER)
        for match in pattern.finditer(text)
    }


assert set(DOES) == set(ACTIONS) and set(WHERE) == set(PLACES) and set(AT) == set(POSITIONS)
