"""Whom words mean: for each token of a StoryWorld document, what one can know there of the figure that it
means.

Letters: B rows, T tokens, N attributes (OF_MENTION).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm_interleaved.documents.document import Document
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    ANSWERS_AT_POSITION,
    LOOK,
    NOT_THERE,
    ONLY_SEEN,
    answers_at,
)
from mm_interleaved.storyworld.world import NAMES as CHARACTERS
from mm_interleaved.storyworld.world import POSITIONS, Figure, Scene, scene_from_record
from mm_interleaved.tokens.visibility import NO_IMAGE

PICTURES_AGO = ("1", "2", "3", "4", "5")
SIDES = ("left", "right")

ANSWERS_OF_MENTION: dict[str, Sequence[str]] = {
    **ANSWERS_AT_POSITION,
    "position": POSITIONS,
    "was_at": POSITIONS,
    "pictures_ago": PICTURES_AGO,
    "side": SIDES,
}
OF_MENTION = tuple(ANSWERS_OF_MENTION)
"""What is to be known of whom a word means: what can be told at a position of a picture; which position that
is; in stories also the position in the newest earlier picture with that character, and how many pictures ago
that was, which is where to look; elsewhere on which side it is of what the same sentence named before."""
SIZES_OF_MENTION = [len(answers) for answers in ANSWERS_OF_MENTION.values()]

_ENDS_OF_SENTENCES = ("?", ".")

Values = Mapping[str, str]
"""What is known, by name of OF_MENTION."""


def mention_labels(
    documents: Sequence[Document], words: Sequence[Sequence[str]], image_start: Tensor, *, is_blind: bool
) -> Tensor:
    """What is known of whom each word means: (B, T, N) int64, numbers of answers or NOT_THERE.

    In stories names mean somebody, and positions in a panel's text: see `_PanelMentions`. In other documents
    kinds of animals and things do, and "on the left" and its like, once a picture shows them.

    Args:
        words: the word of each token, by row; of all rows the same number T.
        image_start: (B, I), index of each image's start token, NO_IMAGE where there is none.
        is_blind: pictures are not seen; badges and patterns are never known then, and of documents other
            than stories nothing is.
    """
    nothing = [NOT_THERE] * len(OF_MENTION)
    labels = [[nothing] * len(words[0]) for _ in documents]
    for row, document in enumerate(documents):
        scenes = [scene_from_record(record) for record in document.meta.get("scenes", ())]
        starts = [start for start in image_start[row].tolist() if start != NO_IMAGE]
        if document.meta.get("task", "").startswith("story"):
            found = _in_story(words[row], scenes, starts, is_blind)
        elif document.meta.get("task") != "segmentation" and not is_blind:
            found = _in_questions(words[row], scenes, starts)
        else:
            continue
        for index, values in found.items():
            labels[row][index] = _numbers(values)
    return torch.tensor(labels, dtype=torch.int64).view(len(documents), len(words[0]), len(OF_MENTION))


def _numbers(values: Values) -> list[int]:
    return [
        answers.index(value) if (value := values.get(name)) in answers else NOT_THERE
        for name, answers in ANSWERS_OF_MENTION.items()
    ]


def _in_story(
    words: Sequence[str], scenes: Sequence[Scene], starts: Sequence[int], is_blind: bool
) -> dict[int, Values]:
    """What is known of whom the words of a story mean, by index of the word.

    A name is known from its second mention on: the first stands before what it introduces. A position means
    whoever will stand there in the next picture, once that name has been said. Badge and pattern are known
    once the character stood in an earlier picture.
    """
    found: dict[int, Values] = {}
    known: set[str] = set()  # names that have been said
    stood: dict[str, tuple[int, str]] = {}  # by name: number of the newest picture, position in it
    begin = 0
    for number, (start, scene) in enumerate(zip(starts, scenes, strict=False)):
        where = {
            name: {"was_at": position, "pictures_ago": str(number - before)}
            for name, (before, position) in stood.items()
        }
        unseen = frozenset(CHARACTERS) if is_blind else frozenset(CHARACTERS) - set(stood)
        for index, figure in _meant_in_panel(words[:start], begin, scene, known).items():
            name = figure.character.name
            values = {key: getattr(figure.character, key) for key in LOOK}
            if name in unseen:
                values = {key: value for key, value in values.items() if key not in ONLY_SEEN}
            # "Mia waves on the left", where the last word tells; "On the left, Mia waves".
            if figure.position in (words[index], words[max(index - 2, 0)]):
                values["position"] = figure.position
            found[index] = {**values, **where.get(name, {})}
        stood |= {figure.character.name: (number, figure.position) for figure in scene.figures}
        begin = start
    return found


def _meant_in_panel(words: Sequence[str], begin: int, scene: Scene, known: set[str]) -> dict[int, Figure]:
    """Who is meant by the words from `begin` on, which tell of `scene`; adds the names that they say to
    `known`.
    """
    by_name = {figure.character.name: figure for figure in scene.figures}
    by_position = {figure.position: figure for figure in scene.figures}
    said: set[str] = set()
    meant: dict[int, Figure] = {}
    for index in range(begin, len(words)):
        word = words[index]
        figure = by_name.get(word) if word in known else by_position.get(word)
        if figure is not None and (word in known or figure.character.name in said):
            meant[index] = figure
        if word in by_name:
            known.add(word)
            said.add(word)
    return meant


def _in_questions(
    words: Sequence[str], scenes: Sequence[Scene], starts: Sequence[int]
) -> Mapping[int, Values]:
    """What is known of whom words mean that ask about the newest picture before them, or tell of it."""
    found: dict[int, dict[str, str]] = {}
    ends = [*starts[1:], len(words)]
    for scene, start, end in zip(scenes, starts, ends, strict=False):
        positions = _positions_of_words(scene)
        named_before: str | None = None
        for index in range(start + 1, end):
            word, before = words[index], words[max(index - 2, 0)].lower()
            if word in _ENDS_OF_SENTENCES:
                named_before = None
            # "on the left" means a place, "to the left of" does not.
            is_place = word in POSITIONS and before in ("on", "in")
            position = word if is_place else positions.get(word)
            if position is not None:
                found[index] = {**answers_at(scene, position), "position": position}
                if named_before is not None and named_before != position:
                    order = POSITIONS.index(position) - POSITIONS.index(named_before)
                    found[index] |= {"side": SIDES[order > 0]}
                named_before = position
    return found


def _positions_of_words(scene: Scene) -> dict[str, str]:
    """Where the animals and things of a scene stand, by their kinds (each of which is there once)."""
    at = {figure.character.species: figure.position for figure in scene.figures}
    return at | {prop.kind: prop.position for prop in scene.props}


def introduction_labels(words: Sequence[Sequence[str]]) -> Tensor:
    """Whom the words introduce, (B, T) int64, indices in CHARACTERS: from the first mention of a name to the
    end of its sentence; NOT_THERE elsewhere.
    """
    labels = []
    for row_words in words:
        said: set[str] = set()
        who = NOT_THERE
        row = []
        for word in row_words:
            if word in CHARACTERS:
                who = NOT_THERE if word in said else CHARACTERS.index(word)
                said.add(word)
            elif word.endswith("."):
                who = NOT_THERE
            row.append(who)
        labels.append(row)
    return torch.tensor(labels, dtype=torch.int64).view(len(words), -1)
