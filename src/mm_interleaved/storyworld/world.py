"""What exists in StoryWorld: characters, props, scenes, and the words for their attributes.

A scene is everything that one image shows. The image (`renderer`), the sentences (`stories`, `tasks`) and
the scores (`oracle`, `scores`) are all functions of it. Every attribute is a word out of a closed list, so
that each has an exact answer.
"""

from dataclasses import dataclass, fields
from typing import Any

from mm_interleaved.seeded_random import SeededRandom

NAMES = (
    "Pip", "Mia", "Tom", "Lulu", "Max", "Zoe", "Ben", "Ivy",
    "Rex", "Nell", "Otto", "Fay", "Gus", "Kit", "Dot", "Sam",
)  # fmt: skip
SPECIES = ("cat", "dog", "rabbit", "bear", "mouse", "frog", "duck", "pig")
BODY_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "grey")
PATTERNS = ("plain", "striped", "spotted", "checked")
HATS = ("none", "cap", "crown", "top hat", "party hat")
HAT_COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
PLACES = ("meadow", "beach", "forest", "town", "desert", "mountain")
TIMES = ("day", "evening", "night")
WEATHERS = ("clear", "cloudy", "rainy", "snowy")
POSITIONS = ("left", "middle", "right")
ACTIONS = ("stand", "wave", "jump", "sit", "sleep", "sing")
PROPS = ("ball", "box", "flower", "cup", "lamp", "book")
PROP_COLOURS = HAT_COLOURS

# Five columns by seven rows. The best of 60,000 random choices (5 digits, 5 letters, 6 symbols) among 31
# drawings: any two differ in at least 10 of the 35 cells.
GLYPHS = {
    "2": "####. ....# ....# .###. #.... #.... #####",
    "4": "#.... #.... #..#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "....# ....# ....# ....# ....# #...# .###.",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "V": "#...# #...# #...# .#.#. .#.#. ..#.. ..#..",
    "arrow": "..#.. .###. ##### ..#.. ..#.. ..#.. ..#..",
    "diamond": "..... ..#.. .###. ##### .###. ..#.. .....",
    "heart": "..... .#.#. ##### ##### ##### .###. ..#..",
    "moon": "..### .##.. ##... ##... ##... .##.. ..###",
    "ring": ".###. ##.## #...# #...# #...# ##.## .###.",
    "triangle": "..... ..#.. ..#.. .###. .###. ##### #####",
}
BADGES = tuple(GLYPHS)

SPLITS = ("train", "validation", "test")
# Of ten residues of a mixed appearance number, those that belong to each split.
_SPLIT_RESIDUES = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Character:
    """Somebody who looks the same in every image of a story. `hat_colour` is "none" exactly if `hat` is."""

    name: str
    species: str
    body_colour: str
    pattern: str
    hat: str
    hat_colour: str
    badge: str

    def __post_init__(self) -> None:
        if (self.hat == "none") != (self.hat_colour == "none"):
            raise ValueError(f"hat {self.hat!r} does not go with hat_colour {self.hat_colour!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A character in one image: which of the three places along the ground it takes, and what it does."""

    character: Character
    position: str
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prop:
    """A thing on the ground, in front of one of the three places."""

    kind: str
    colour: str
    position: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that one image shows. At most one figure and one prop stand at each position."""

    place: str
    time: str
    weather: str
    figures: tuple[Figure, ...] = ()
    props: tuple[Prop, ...] = ()

    def __post_init__(self) -> None:
        for things in (self.figures, self.props):
            positions = [thing.position for thing in things]
            if len(set(positions)) != len(positions):
                raise ValueError(f"one position is taken twice: {positions}")


def appearance_number(character: Character) -> int:
    """The character's place in the list of all appearances: one integer for each combination of what can
    be seen.
    """
    hats = ("none", *HAT_COLOURS)
    number = 0
    for value, words in (
        (character.species, SPECIES),
        (character.body_colour, BODY_COLOURS),
        (character.pattern, PATTERNS),
        (character.hat, HATS),
        (character.hat_colour, hats),
        (character.badge, BADGES),
    ):
        number = number * len(words) + words.index(value)
    return number


def split_of(character: Character) -> str:
    """The one split in which somebody who looks like this may appear: splits share no image, whatever
    the seeds.
    """
    residue = _mixed(appearance_number(character)) % 10
    return next(split for split, residues in _SPLIT_RESIDUES.items() if residue in residues)


def is_held_out(species: str, body_colour: str) -> bool:
    """Whether only the test split shows this combination: one body colour of eight for each species."""
    return (SPECIES.index(species) * 3 + BODY_COLOURS.index(body_colour)) % len(BODY_COLOURS) == 5


def random_character(
    rng: SeededRandom, split: str, *, names: tuple[str, ...] = NAMES, held_out: bool = False
) -> Character:
    """A character of the split; with `held_out` one whose species and colour training never shows.

    Args:
        names: the names to choose among; a cast gives names away only once.
        held_out: only possible in the test split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    if held_out and split != "test":
        raise ValueError(f"held-out combinations stand in the test split only, not in {split!r}")
    while True:
        hat = rng.pick(HATS)
        character = Character(
            name=rng.pick(names),
            species=rng.pick(SPECIES),
            body_colour=rng.pick(BODY_COLOURS),
            pattern=rng.pick(PATTERNS),
            hat=hat,
            hat_colour="none" if hat == "none" else rng.pick(HAT_COLOURS),
            badge=rng.pick(BADGES),
        )
        if is_held_out(character.species, character.body_colour) == held_out and split_of(character) == split:
            return character


def random_scene(rng: SeededRandom, split: str = "train") -> Scene:
    """A scene of one to three characters and up to two props, each choice independent of the others."""
    num_figures = rng.weighted((1, 2, 3), (45, 40, 15))
    cast = random_cast(rng, split, num_figures)
    positions = rng.sample(POSITIONS, num_figures)
    num_props = rng.weighted((0, 1, 2), (25, 50, 25))
    return Scene(
        place=rng.pick(PLACES),
        time=rng.pick(TIMES),
        weather=rng.pick(WEATHERS),
        figures=tuple(
            Figure(character=character, position=position, action=rng.pick(ACTIONS))
            for character, position in zip(cast, positions, strict=True)
        ),
        props=tuple(
            Prop(kind=kind, colour=rng.pick(PROP_COLOURS), position=position)
            for kind, position in zip(
                rng.sample(PROPS, num_props), rng.sample(POSITIONS, num_props), strict=True
            )
        ),
    )


def random_cast(rng: SeededRandom, split: str, num_characters: int) -> tuple[Character, ...]:
    """Characters with different names, species, body colours and badges, so that words tell them apart.

    In the test split a quarter of the casts are led by a held-out combination.
    """
    cast = [random_character(rng, split, held_out=split == "test" and rng.chance(25))]
    while len(cast) < num_characters:
        candidate = random_character(rng, split)
        if all(_are_distinct(candidate, other) for other in cast):
            cast.append(candidate)
    return tuple(cast)


def scene_to_record(scene: Scene) -> dict[str, Any]:
    """The scene as a JSON object: the truth that documents carry in `meta`."""
    return {
        "place": scene.place,
        "time": scene.time,
        "weather": scene.weather,
        "figures": [
            {
                **{field.name: getattr(figure.character, field.name) for field in fields(Character)},
                "position": figure.position,
                "action": figure.action,
            }
            for figure in scene.figures
        ],
        "props": [{field.name: getattr(prop, field.name) for field in fields(Prop)} for prop in scene.props],
    }


def scene_from_record(record: dict[str, Any]) -> Scene:
    """The scene that `scene_to_record` wrote."""
    return Scene(
        place=record["place"],
        time=record["time"],
        weather=record["weather"],
        figures=tuple(
            Figure(
                character=Character(**{field.name: figure[field.name] for field in fields(Character)}),
                position=figure["position"],
                action=figure["action"],
            )
            for figure in record["figures"]
        ),
        props=tuple(Prop(**prop) for prop in record["props"]),
    )


def check_scene(record: Any) -> Scene:
    """The scene of a record that may hold anything. Raises ValueError where it is not of this world."""
    try:
        scene = scene_from_record(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    looks = [(figure.character, name) for figure in scene.figures for name in _WORDS[Character]]
    poses = [(figure, name) for figure in scene.figures for name in _WORDS[Figure]]
    props = [(prop, name) for prop in scene.props for name in _WORDS[Prop]]
    for thing, name in [*((scene, name) for name in _WORDS[Scene]), *looks, *poses, *props]:
        value = getattr(thing, name)
        if value not in _WORDS[type(thing)][name]:
            raise ValueError(f"{name}: found {value!r}")
    return scene


_WORDS: dict[type, dict[str, tuple[str, ...]]] = {
    Scene: {"place": PLACES, "time": TIMES, "weather": WEATHERS},
    Character: {
        "name": NAMES,
        "species": SPECIES,
        "body_colour": BODY_COLOURS,
        "pattern": PATTERNS,
        "hat": HATS,
        "hat_colour": ("none", *HAT_COLOURS),
        "badge": BADGES,
    },
    Figure: {"position": POSITIONS, "action": ACTIONS},
    Prop: {"kind": PROPS, "colour": PROP_COLOURS, "position": POSITIONS},
}
"""The words that each attribute may have."""


def words_of(attribute: str) -> tuple[str, ...]:
    """The words that an attribute of a scene, a character, a figure or a prop may have; none for others.

    A prop's colour is one of `hat_colour`.
    """
    return next((words[attribute] for words in _WORDS.values() if attribute in words), ())


def _are_distinct(one: Character, other: Character) -> bool:
    return (
        one.name != other.name
        and one.species != other.species
        and one.body_colour != other.body_colour
        and one.badge != other.badge
    )


def _mixed(number: int) -> int:
    """The finaliser of SplitMix64: neighbouring numbers get unrelated 64-bit values."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)
