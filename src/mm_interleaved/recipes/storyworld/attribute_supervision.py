"""Naming: what a picture shows as numbers of right answers, and the loss of a linear reader that guesses
them.

Letters: I pictures, A answers of one attribute, N attributes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.storyworld.backgrounds import PICTURE_SIZE
from mm_interleaved.storyworld.renderer import badge_box, figure_box, prop_box
from mm_interleaved.storyworld.world import (
    ACTIONS,
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
    Scene,
    scene_from_record,
)
from mm_interleaved.storyworld.world import NAMES as CHARACTERS

NOT_THERE = -100
_NOBODY = "nobody"
_EVERYBODY = frozenset(CHARACTERS)
ONLY_SEEN = ("pattern", "badge")
"""Attributes that no text tells."""

ANSWERS_AT_POSITION: dict[str, Sequence[str]] = {
    "species": (_NOBODY, *SPECIES),
    "body_colour": BODY_COLOURS,
    "pattern": PATTERNS,
    "hat": HATS,
    "hat_colour": HAT_COLOURS,
    "badge": BADGES,
    "action": ACTIONS,
    "prop": (_NOBODY, *PROPS),
    "prop_colour": PROP_COLOURS,
}
_SETTING: dict[str, Sequence[str]] = {"place": PLACES, "time": TIMES, "weather": WEATHERS}
AT_POSITION = list(ANSWERS_AT_POSITION)
"""Attributes of the figure and the prop at one position."""
NAMES = [f"{name}@{position}" for position in POSITIONS for name in ANSWERS_AT_POSITION] + list(_SETTING)
LOOK = ("species", "body_colour", "pattern", "hat", "hat_colour", "badge")
"""Attributes of a character, wherever it stands."""
IS_ONLY_SEEN = torch.tensor([name.startswith(ONLY_SEEN) for name in NAMES])
SIZES_AT_POSITION = [len(answers) for answers in ANSWERS_AT_POSITION.values()]
SIZES = SIZES_AT_POSITION * len(POSITIONS)
SIZES += [len(answers) for answers in _SETTING.values()]


def scene_labels(scene: Scene, unknown: frozenset[str] = frozenset()) -> list[int]:
    """For each attribute at each position, and of the setting, the number of its answer, or NOT_THERE.

    Args:
        unknown: names of characters whose badge and pattern are not to be named.
    """
    labels = []
    for position in POSITIONS:
        values = answers_at(scene, position, unknown)
        for name, answers in ANSWERS_AT_POSITION.items():
            value = values.get(name)
            labels.append(answers.index(value) if value in answers else NOT_THERE)
    return labels + [answers.index(getattr(scene, name)) for name, answers in _SETTING.items()]


def answers_at(scene: Scene, position: str, unknown: frozenset[str] = frozenset()) -> Mapping[str, str]:
    """What there is to tell of the figure and the thing at a position, by name of AT_POSITION."""
    figure = next((figure for figure in scene.figures if figure.position == position), None)
    prop = next((prop for prop in scene.props if prop.position == position), None)
    values = {"species": _NOBODY, "prop": _NOBODY}
    if figure is not None:
        names = [name for name in LOOK if figure.character.name not in unknown or name not in ONLY_SEEN]
        values |= {name: getattr(figure.character, name) for name in names}
        values["action"] = figure.action
    if prop is not None:
        values["prop"], values["prop_colour"] = prop.kind, prop.colour
    return values


def cell_labels(scene: Scene, size: int) -> Tensor:
    """What each of `size` by `size` cells over a picture lies on, (attributes of a position, size, size)
    int64.

    A cell whose centre is in the box of a figure has the figure's answers, one in the box of a prop the
    prop's; all else is NOT_THERE. Answers are those of `scene_labels` at that position.
    """
    answers_PA = torch.tensor(scene_labels(scene)[: -len(_SETTING)]).view(len(POSITIONS), -1)
    labels = torch.full((len(AT_POSITION), size, size), NOT_THERE)
    is_of_prop_A = torch.tensor([name.startswith("prop") for name in AT_POSITION])
    things = [(figure_box(figure), figure.position, ~is_of_prop_A) for figure in scene.figures]
    things += [(prop_box(prop), prop.position, is_of_prop_A) for prop in scene.props]
    centre = (torch.arange(size) + 0.5) * (PICTURE_SIZE / size)
    for (left, top, right, bottom), position, is_told_A in things:
        is_column = (centre >= left) & (centre < right + 1)
        is_row = (centre >= top) & (centre < bottom + 1)
        box = is_told_A[:, None, None] & is_row[:, None] & is_column
        answer_A11 = answers_PA[POSITIONS.index(position)][:, None, None]
        labels = torch.where(box, answer_A11, labels)
    return labels


def badge_cells(documents: Sequence[Document], size: int) -> Tensor:
    """Which of `size` by `size` cells over each picture show a part of a badge: (I, size, size) bool.

    The pictures are those of all documents in order; of documents without scenes nothing is known.
    """
    masks = []
    cell = PICTURE_SIZE // size
    for document in documents:
        scenes = _scenes(document)
        for number in range(sum(isinstance(part, Image) for part in document.parts)):
            mask = torch.zeros(size, size, dtype=torch.bool)
            for figure in scenes[number].figures if scenes else ():
                left, top, right, bottom = badge_box(figure)
                mask[top // cell : bottom // cell + 1, left // cell : right // cell + 1] = True
            masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, size, size, dtype=torch.bool)


def painting_labels(documents: Sequence[Document]) -> Tensor:
    """What one may know of each picture before it is painted: (I, N) int64.

    That is what the words before the picture tell, and the badge and pattern of whoever stands in an earlier
    picture of the document. The pictures are those of all documents in order. Of a document without scenes,
    and of a picture without anything before it, nothing is known.
    """
    return _labels_before(documents, _seen_before)


def told_labels(documents: Sequence[Document]) -> Tensor:
    """The same of a reader who sees no pictures: what words alone tell, (I, N) int64."""
    return _labels_before(documents, lambda document: repeat(frozenset[str]()))


def true_labels(documents: Sequence[Document]) -> Tensor:
    """The same of one who knows all that the picture will show: (I, N) int64."""
    return _labels_before(documents, lambda document: repeat(_EVERYBODY))


def _labels_before(
    documents: Sequence[Document], known_before: Callable[[Document], Iterable[frozenset[str]]]
) -> Tensor:
    """Labels of all pictures, by a rule: document → for each of its pictures, the names of the characters
    whose badge and pattern are known before it.
    """
    rows = []
    for document in documents:
        scenes = _scenes(document)
        images = [index for index, part in enumerate(document.parts) if isinstance(part, Image)]
        known = known_before(document)
        for number, (index, names) in enumerate(zip(images, known, strict=False)):
            if not scenes or index == 0:
                rows.append([NOT_THERE] * len(SIZES))
            else:
                present = frozenset(figure.character.name for figure in scenes[number].figures)
                rows.append(scene_labels(scenes[number], present - names))
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(SIZES))


def _seen_before(document: Document) -> Iterator[frozenset[str]]:
    """For each picture of a document, who stands in an earlier one; a segmentation map shows nobody."""
    seen: frozenset[str] = frozenset()
    scenes = _scenes(document)
    for number in range(sum(isinstance(part, Image) for part in document.parts)):
        yield seen
        if scenes and document.meta.get("task") != "segmentation":
            seen |= {figure.character.name for figure in scenes[number].figures}


def _scenes(document: Document) -> list[Scene]:
    return [scene_from_record(record) for record in document.meta.get("scenes", ())]


def known_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are known, in float32; 0 if none is.

    Args:
        logits: (M, A) or (M, A, ...).
        labels: (M) or (M, ...) int64, NOT_THERE where nothing is known.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=NOT_THERE, reduction="sum")
    return total / (labels != NOT_THERE).sum().clamp(min=1)


def naming_losses(answers: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Mean cross-entropy of each attribute, over the pictures that have it (0 if none has).

    Args:
        answers: (I, sum(SIZES)) logits.
        labels: (I, N), see `scene_labels`.
    """
    return {
        name: known_cross_entropy(logits_IA, labels_I)
        for name, logits_IA, labels_I in zip(NAMES, answers.split(SIZES, dim=1), labels.T, strict=True)
    }


def mean_loss(losses: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """Mean over the attributes whose name begins with the prefix."""
    return torch.stack([loss for name, loss in losses.items() if name.startswith(prefix)]).mean()
