"""Questions about one scene, each with its exact answer of one or two words.

A question's kind is its name in the table at the end; kinds in FINE_DETAIL ask what only a close look can
tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.language import AT, COUNTS, DOES, from_left
from mm_interleaved.storyworld.world import (
    BADGES,
    BODY_COLOURS,
    HAT_COLOURS,
    HATS,
    PATTERNS,
    PLACES,
    PROPS,
    SPECIES,
    TIMES,
    WEATHERS,
    Scene,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and its answer."""

    kind: str
    text: str
    answer: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers of which this is one."""
        return answers_of(self.kind)

    @property
    def is_fine_detail(self) -> bool:
        """Whether it asks for a badge or a pattern."""
        return self.kind in FINE_DETAIL


def ask(rng: SeededRandom, scene: Scene, kind: str | None = None) -> Question:
    """A question that the scene can answer; without a kind, a third are about fine detail."""
    if kind is not None:
        question = QUESTIONS[kind](rng, scene)
        if question is None:
            raise ValueError(f"this scene has no answer to a question of kind {kind!r}")
        return question
    is_fine_detail = rng.chance(35)
    while True:
        kind = rng.weighted(FINE_DETAIL, (70, 30)) if is_fine_detail else rng.pick(_COARSE)
        question = QUESTIONS[kind](rng, scene)
        if question is not None:
            return question


def ask_several(rng: SeededRandom, scene: Scene, count: int) -> list[Question]:
    """Questions with different texts."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = ask(rng, scene)
        found.setdefault(question.text, question)
    return list(found.values())


def _badge(rng: SeededRandom, scene: Scene) -> Question:
    character = rng.pick(scene.figures).character
    return Question(
        kind="badge",
        text=f"What is on the badge of the {character.species}?",
        answer=character.badge,
    )


def _pattern(rng: SeededRandom, scene: Scene) -> Question:
    character = rng.pick(scene.figures).character
    return Question(
        kind="pattern",
        text=f"Which pattern does the {character.species} have?",
        answer=character.pattern,
    )


def _body_colour(rng: SeededRandom, scene: Scene) -> Question:
    character = rng.pick(scene.figures).character
    return Question(
        kind="body_colour",
        text=f"What colour is the {character.species}?",
        answer=character.body_colour,
    )


def _species(rng: SeededRandom, scene: Scene) -> Question:
    figure = rng.pick(scene.figures)
    return Question(
        kind="species",
        text=f"Which animal is {AT[figure.position]}?",
        answer=figure.character.species,
    )


def _hat(rng: SeededRandom, scene: Scene) -> Question:
    character = rng.pick(scene.figures).character
    return Question(
        kind="hat",
        text=f"Which hat does the {character.species} wear?",
        answer=character.hat,
    )


def _hat_colour(rng: SeededRandom, scene: Scene) -> Question | None:
    wearers = [figure.character for figure in scene.figures if figure.character.hat != "none"]
    if not wearers:
        return None
    character = rng.pick(wearers)
    return Question(
        kind="hat_colour",
        text=f"What colour is the {character.hat} of the {character.species}?",
        answer=character.hat_colour,
    )


def _action(rng: SeededRandom, scene: Scene) -> Question:
    figure = rng.pick(scene.figures)
    return Question(
        kind="action",
        text=f"What does the {figure.character.species} do?",
        answer=DOES[figure.action],
    )


def _place(rng: SeededRandom, scene: Scene) -> Question:
    return Question(kind="place", text="Which place is this?", answer=scene.place)


def _time(rng: SeededRandom, scene: Scene) -> Question:
    return Question(kind="time", text="Which time of day is it?", answer=scene.time)


def _weather(rng: SeededRandom, scene: Scene) -> Question:
    return Question(kind="weather", text="How is the weather?", answer=scene.weather)


def _count_animals(rng: SeededRandom, scene: Scene) -> Question:
    return Question(
        kind="count_animals",
        text="How many animals are there?",
        answer=COUNTS[len(scene.figures)],
    )


def _count_props(rng: SeededRandom, scene: Scene) -> Question:
    return Question(
        kind="count_props",
        text="How many things are on the ground?",
        answer=COUNTS[len(scene.props)],
    )


def _prop_colour(rng: SeededRandom, scene: Scene) -> Question | None:
    if not scene.props:
        return None
    prop = rng.pick(scene.props)
    return Question(
        kind="prop_colour",
        text=f"What colour is the {prop.kind}?",
        answer=prop.colour,
    )


def _prop_kind(rng: SeededRandom, scene: Scene) -> Question | None:
    """Which thing stands before somebody: a relation that may not hold."""
    if not scene.props:
        return None
    figure = rng.pick(scene.figures)
    kinds = [prop.kind for prop in scene.props if prop.position == figure.position]
    return Question(
        kind="in_front",
        text=f"What is in front of the {figure.character.species}?",
        answer=kinds[0] if kinds else "nothing",
    )


def _next_to(rng: SeededRandom, scene: Scene) -> Question | None:
    figures = from_left(scene.figures)
    if len(figures) < 2:
        return None
    number = rng.below(len(figures) - 1)
    one, other = figures[number], figures[number + 1]
    if rng.chance(50):
        text, answer = f"Who is to the left of the {other.character.species}?", one.character.species
        # With three in a row two are to the left of the last: ask for the nearest.
        text = text if number == 0 else f"Who is next to the left of the {other.character.species}?"
    else:
        text, answer = f"Who is to the right of the {one.character.species}?", other.character.species
        text = (
            text
            if number + 2 == len(figures)
            else f"Who is next to the right of the {one.character.species}?"
        )
    return Question(kind="next_to", text=text, answer=answer)


def _is_left_of(rng: SeededRandom, scene: Scene) -> Question | None:
    if len(scene.figures) < 2:
        return None
    one, other = rng.sample(scene.figures, 2)
    is_left = list(AT).index(one.position) < list(AT).index(other.position)
    return Question(
        kind="is_left_of",
        text=f"Is the {one.character.species} to the left of the {other.character.species}?",
        answer="yes" if is_left else "no",
    )


QUESTIONS: dict[str, Callable[[SeededRandom, Scene], Question | None]] = {
    "badge": _badge,
    "pattern": _pattern,
    "body_colour": _body_colour,
    "species": _species,
    "hat": _hat,
    "hat_colour": _hat_colour,
    "action": _action,
    "place": _place,
    "time": _time,
    "weather": _weather,
    "count_animals": _count_animals,
    "count_props": _count_props,
    "prop_colour": _prop_colour,
    "in_front": _prop_kind,
    "next_to": _next_to,
    "is_left_of": _is_left_of,
}
FINE_DETAIL: Sequence[str] = ("badge", "pattern")
RELATIONS: Sequence[str] = ("in_front", "is_left_of")
"""Kinds that ask whether two things stand to each other in a certain way; they take longest to learn."""
_COARSE = tuple(kind for kind in QUESTIONS if kind not in FINE_DETAIL)

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "badge": BADGES,
    "pattern": PATTERNS,
    "body_colour": BODY_COLOURS,
    "species": SPECIES,
    "hat": HATS,
    "hat_colour": HAT_COLOURS,
    "action": tuple(DOES.values()),
    "place": PLACES,
    "time": TIMES,
    "weather": WEATHERS,
    "count_animals": COUNTS,
    "count_props": COUNTS,
    "prop_colour": HAT_COLOURS,
    "in_front": (*PROPS, "nothing"),
    "next_to": SPECIES,
    "is_left_of": ("yes", "no"),
}


def answers_of(kind: str) -> tuple[str, ...]:
    """All answers to questions of a kind; none for a kind that does not exist."""
    return _CHOICES.get(kind, ())


assert set(_CHOICES) == set(QUESTIONS)
