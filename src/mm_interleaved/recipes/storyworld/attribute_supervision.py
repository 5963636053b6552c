"""Attribute supervision: what an image of StoryWorld shows, as class labels, and the loss of guessing them.

An attribute is, for example, the hat of whoever stands on the left; its values are the classes. What must
guess them, a linear probe or a conditioning, is no matter here.
Letters: I images, A values of one attribute, N attributes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
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

NO_LABEL = -100
"""Label of an attribute that an image does not have, or that cannot be known: cross-entropy skips it."""
_NOBODY = "nobody"
_EVERYBODY = frozenset(CHARACTERS)
IMAGE_ONLY = ("pattern", "badge")
"""Attributes that no text of StoryWorld states: only images show them."""

VALUES_AT_POSITION: dict[str, Sequence[str]] = {
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
ATTRIBUTES_AT_POSITION = list(VALUES_AT_POSITION)
"""Attributes of the figure and the prop at one position."""
ATTRIBUTES = [f"{name}@{position}" for position in POSITIONS for name in VALUES_AT_POSITION] + list(_SETTING)
APPEARANCE = ("species", "body_colour", "pattern", "hat", "hat_colour", "badge")
"""Attributes of a character, wherever it stands."""
IS_IMAGE_ONLY = torch.tensor([name.startswith(IMAGE_ONLY) for name in ATTRIBUTES])
NUM_VALUES_AT_POSITION = [len(values) for values in VALUES_AT_POSITION.values()]
NUM_VALUES = NUM_VALUES_AT_POSITION * len(POSITIONS) + [len(values) for values in _SETTING.values()]
"""How many values each of ATTRIBUTES has, in their order."""


def scene_labels(scene: Scene, unknown: frozenset[str] = frozenset()) -> list[int]:
    """For each of ATTRIBUTES the index of its value, or NO_LABEL.

    Args:
        unknown: names of characters whose badge and pattern get no label.
    """
    labels = []
    for position in POSITIONS:
        values = values_at(scene, position, unknown)
        for name, known_values in VALUES_AT_POSITION.items():
            value = values.get(name)
            labels.append(known_values.index(value) if value in known_values else NO_LABEL)
    return labels + [values.index(getattr(scene, name)) for name, values in _SETTING.items()]


def values_at(scene: Scene, position: str, unknown: frozenset[str] = frozenset()) -> Mapping[str, str]:
    """The attributes of the figure and the thing at a position, by name of ATTRIBUTES_AT_POSITION."""
    figure = next((figure for figure in scene.figures if figure.position == position), None)
    prop = next((prop for prop in scene.props if prop.position == position), None)
    values = {"species": _NOBODY, "prop": _NOBODY}
    if figure is not None:
        names = [
            name for name in APPEARANCE if figure.character.name not in unknown or name not in IMAGE_ONLY
        ]
        values |= {name: getattr(figure.character, name) for name in names}
        values["action"] = figure.action
    if prop is not None:
        values["prop"], values["prop_colour"] = prop.kind, prop.colour
    return values


def cell_labels(scene: Scene, size: int) -> Tensor:
    """What each of `size` by `size` cells over an image lies on, (attributes of a position, size, size)
    int64.

    A cell whose centre is in the box of a figure has the figure's labels, one in the box of a prop the
    prop's; all else is NO_LABEL. Labels are those of `scene_labels` at that position.
    """
    labels_PN = torch.tensor(scene_labels(scene)[: -len(_SETTING)]).view(len(POSITIONS), -1)
    labels = torch.full((len(ATTRIBUTES_AT_POSITION), size, size), NO_LABEL)
    is_of_prop_N = torch.tensor([name.startswith("prop") for name in ATTRIBUTES_AT_POSITION])
    things = [(figure_box(figure), figure.position, ~is_of_prop_N) for figure in scene.figures]
    things += [(prop_box(prop), prop.position, is_of_prop_N) for prop in scene.props]
    centre = (torch.arange(size) + 0.5) * (IMAGE_SIZE / size)
    for (left, top, right, bottom), position, is_its_N in things:
        is_column = (centre >= left) & (centre < right + 1)
        is_row = (centre >= top) & (centre < bottom + 1)
        box = is_its_N[:, None, None] & is_row[:, None] & is_column
        label_N11 = labels_PN[POSITIONS.index(position)][:, None, None]
        labels = torch.where(box, label_N11, labels)
    return labels


def badge_cells(documents: Sequence[Document], size: int) -> Tensor:
    """Which of `size` by `size` cells over each image show a part of a badge: (I, size, size) bool.

    The images are those of all documents in order; of documents without scenes nothing is known.
    """
    masks = []
    cell = IMAGE_SIZE // size
    for document in documents:
        scenes = _scenes(document)
        for number in range(sum(isinstance(part, Image) for part in document.parts)):
            mask = torch.zeros(size, size, dtype=torch.bool)
            for figure in scenes[number].figures if scenes else ():
                left, top, right, bottom = badge_box(figure)
                mask[top // cell : bottom // cell + 1, left // cell : right // cell + 1] = True
            masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, size, size, dtype=torch.bool)


def known_labels(documents: Sequence[Document]) -> Tensor:
    """What can be known of each image before it is generated: (I, N) int64.

    That is what the text before the image states, and the badge and pattern of whoever stands in an earlier
    image of the document. The images are those of all documents in order. Of a document without scenes, and
    of an image without anything before it, nothing is known.
    """
    return _labels_before(documents, _seen_before)


def stated_labels(documents: Sequence[Document]) -> Tensor:
    """What text alone states of each image before it is generated: (I, N) int64, see `known_labels`."""
    return _labels_before(documents, lambda document: repeat(frozenset[str]()))


def true_labels(documents: Sequence[Document]) -> Tensor:
    """All that each image shows: (I, N) int64, images as in `known_labels`."""
    return _labels_before(documents, lambda document: repeat(_EVERYBODY))


def _labels_before(
    documents: Sequence[Document], known_before: Callable[[Document], Iterable[frozenset[str]]]
) -> Tensor:
    """Labels of all images, by a rule: document → for each of its images, the names of the characters whose
    badge and pattern are known before it.
    """
    rows = []
    for document in documents:
        scenes = _scenes(document)
        images = [index for index, part in enumerate(document.parts) if isinstance(part, Image)]
        known = known_before(document)
        for number, (index, names) in enumerate(zip(images, known, strict=False)):
            # A map shows another image's scene, and no text before it tells that it is one.
            is_map = document.meta.get("task") == "detail_segmentation" and number == 1
            if not scenes or index == 0 or is_map:
                rows.append([NO_LABEL] * len(ATTRIBUTES))
            else:
                present = frozenset(figure.character.name for figure in scenes[number].figures)
                rows.append(scene_labels(scenes[number], present - names))
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(ATTRIBUTES))


def _seen_before(document: Document) -> Iterator[frozenset[str]]:
    """For each image of a document, who stands in an earlier one; a segmentation map shows nobody."""
    seen: frozenset[str] = frozenset()
    scenes = _scenes(document)
    for number in range(sum(isinstance(part, Image) for part in document.parts)):
        yield seen
        if scenes and document.meta.get("task") not in ("segmentation", "detail_segmentation"):
            seen |= {figure.character.name for figure in scenes[number].figures}


def _scenes(document: Document) -> list[Scene]:
    return [scene_from_record(record) for record in document.meta.get("scenes", ())]


def known_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are known, in float32; 0 if none is.

    Args:
        logits: (M, A) or (M, A, ...), M images or places.
        labels: (M) or (M, ...) int64, NO_LABEL where nothing is known.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def attribute_losses(logits: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Mean cross-entropy of each of ATTRIBUTES, over the images that have it (0 if none has).

    Args:
        logits: (I, sum(NUM_VALUES)).
        labels: (I, N), see `scene_labels`.
    """
    return {
        name: known_cross_entropy(logits_IA, labels_I)
        for name, logits_IA, labels_I in zip(
            ATTRIBUTES, logits.split(NUM_VALUES, dim=1), labels.T, strict=True
        )
    }


def mean_loss(losses: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """Mean over the attributes whose name begins with the prefix."""
    return torch.stack([loss for name, loss in losses.items() if name.startswith(prefix)]).mean()
