"""Coreference supervision: for each token of a StoryWorld document that mentions a figure, what can be known
there of that figure, as class labels.

Letters: B rows, T tokens, N attributes (ATTRIBUTES_OF_MENTION).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm_interleaved.documents.document import Document
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    APPEARANCE,
    IMAGE_ONLY,
    NO_LABEL,
    VALUES_AT_POSITION,
    values_at,
)
from mm_interleaved.storyworld.world import NAMES as CHARACTERS
from mm_interleaved.storyworld.world import POSITIONS, Figure, Scene, scene_from_record
from mm_interleaved.tokens.visibility import NO_IMAGE

IMAGES_AGO = ("1", "2", "3", "4", "5")
SIDES = ("left", "right")

VALUES_OF_MENTION: dict[str, Sequence[str]] = {
    **VALUES_AT_POSITION,
    "position": POSITIONS,
    "was_at": POSITIONS,
    "images_ago": IMAGES_AGO,
    "side": SIDES,
}
ATTRIBUTES_OF_MENTION = tuple(VALUES_OF_MENTION)
"""What is to be known of the figure that a word mentions: the attributes at its position; which position that
is; in stories also the position in the newest earlier image with that character, and how many images ago
that was, which is where to attend; elsewhere on which side it is of what the same sentence named before."""
NUM_VALUES_OF_MENTION = [len(values) for values in VALUES_OF_MENTION.values()]

_ENDS_OF_SENTENCES = ("?", ".")

Values = Mapping[str, str]
"""What is known, by name of ATTRIBUTES_OF_MENTION."""


def mention_labels(
    documents: Sequence[Document], words: Sequence[Sequence[str]], image_start: Tensor, *, is_text_only: bool
) -> Tensor:
    """What is known of the figure that each word mentions: (B, T, N) int64, indices of values or NO_LABEL.

    In stories names mention somebody, and so do positions in a panel's text: see `_in_story`. In other
    documents kinds of animals and things do, and "on the left" and its like, once an image shows them.

    Args:
        words: the word of each token, by row; of all rows the same number T.
        image_start: (B, I), index of each image's start token, NO_IMAGE where there is none.
        is_text_only: images are not seen; badges and patterns are never known then, and of documents other
            than stories nothing is.
    """
    nothing = [NO_LABEL] * len(ATTRIBUTES_OF_MENTION)
    labels = [[nothing] * len(words[0]) for _ in documents]
    for row, document in enumerate(documents):
        scenes = [scene_from_record(record) for record in document.meta.get("scenes", ())]
        starts = [start for start in image_start[row].tolist() if start != NO_IMAGE]
        task = document.meta.get("task", "").removeprefix("detail_")
        if task.startswith("story"):
            found = _in_story(words[row], scenes, starts, is_text_only)
        elif task != "segmentation" and not is_text_only:
            found = _in_questions(words[row], scenes, starts)
        else:
            continue
        for index, values in found.items():
            labels[row][index] = _numbers(values)
    return torch.tensor(labels, dtype=torch.int64).view(
        len(documents), len(words[0]), len(ATTRIBUTES_OF_MENTION)
    )


def _numbers(values: Values) -> list[int]:
    return [
        known_values.index(value) if (value := values.get(name)) in known_values else NO_LABEL
        for name, known_values in VALUES_OF_MENTION.items()
    ]


def _in_story(
    words: Sequence[str], scenes: Sequence[Scene], starts: Sequence[int], is_text_only: bool
) -> dict[int, Values]:
    """What is known of the figures that the words of a story mention, by index of the word.

    A name is known from its second mention on: the first stands before what it introduces. A position
    mentions whoever will stand there in the next image, once that name has been read. Badge and pattern are
    known once the character stood in an earlier image.
    """
    found: dict[int, Values] = {}
    known: set[str] = set()  # names that have been read
    stood: dict[str, tuple[int, str]] = {}  # by name: number of the newest image, position in it
    begin = 0
    for number, (start, scene) in enumerate(zip(starts, scenes, strict=False)):
        where = {
            name: {"was_at": position, "images_ago": str(number - before)}
            for name, (before, position) in stood.items()
        }
        unseen = frozenset(CHARACTERS) if is_text_only else frozenset(CHARACTERS) - set(stood)
        for index, figure in _mentioned_in_panel(words[:start], begin, scene, known).items():
            name = figure.character.name
            values = {key: getattr(figure.character, key) for key in APPEARANCE}
            if name in unseen:
                values = {key: value for key, value in values.items() if key not in IMAGE_ONLY}
            # "Mia waves on the left", where the last word states it; "On the left, Mia waves".
            if figure.position in (words[index], words[max(index - 2, 0)]):
                values["position"] = figure.position
            found[index] = {**values, **where.get(name, {})}
        stood |= {figure.character.name: (number, figure.position) for figure in scene.figures}
        begin = start
    return found


def _mentioned_in_panel(words: Sequence[str], begin: int, scene: Scene, known: set[str]) -> dict[int, Figure]:
    """Which figure each word from `begin` on mentions, all of which describe `scene`; adds the names among
    them to `known`.
    """
    by_name = {figure.character.name: figure for figure in scene.figures}
    by_position = {figure.position: figure for figure in scene.figures}
    in_panel: set[str] = set()
    mentioned: dict[int, Figure] = {}
    for index in range(begin, len(words)):
        word = words[index]
        figure = by_name.get(word) if word in known else by_position.get(word)
        if figure is not None and (word in known or figure.character.name in in_panel):
            mentioned[index] = figure
        if word in by_name:
            known.add(word)
            in_panel.add(word)
    return mentioned


def _in_questions(
    words: Sequence[str], scenes: Sequence[Scene], starts: Sequence[int]
) -> Mapping[int, Values]:
    """What is known of the figures that words mention which ask about the newest image before them, or
    describe it.
    """
    found: dict[int, dict[str, str]] = {}
    ends = [*starts[1:], len(words)]
    for scene, start, end in zip(scenes, starts, ends, strict=False):
        positions = _positions_of_words(scene)
        named_before: str | None = None
        for index in range(start + 1, end):
            word, before = words[index], words[max(index - 2, 0)].lower()
            if word in _ENDS_OF_SENTENCES:
                named_before = None
            # "on the left" mentions a place, "to the left of" does not.
            is_place = word in POSITIONS and before in ("on", "in")
            position = word if is_place else positions.get(word)
            if position is not None:
                found[index] = {**values_at(scene, position), "position": position}
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
    end of its sentence; NO_LABEL elsewhere.
    """
    labels = []
    for row_words in words:
        before: set[str] = set()
        who = NO_LABEL
        row = []
        for word in row_words:
            if word in CHARACTERS:
                who = NO_LABEL if word in before else CHARACTERS.index(word)
                before.add(word)
            elif word.endswith("."):
                who = NO_LABEL
            row.append(who)
        labels.append(row)
    return torch.tensor(labels, dtype=torch.int64).view(len(words), -1)
