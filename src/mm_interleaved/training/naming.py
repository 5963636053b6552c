"""Naming: what a picture shows as numbers of right answers, and the loss of a linear reader that guesses
them.

Letters: I pictures, A answers of one attribute, N attributes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.document import Document, Image
from mm_interleaved.errors import UsageError
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

NOT_THERE = -100
_NOBODY = "nobody"
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
        scenes = [scene_from_record(record) for record in document.meta.get("scenes", ())]
        for number in range(sum(isinstance(part, Image) for part in document.parts)):
            mask = torch.zeros(size, size, dtype=torch.bool)
            for figure in scenes[number].figures if scenes else ():
                left, top, right, bottom = badge_box(figure)
                mask[top // cell : bottom // cell + 1, left // cell : right // cell + 1] = True
            masks.append(mask)
    return torch.stack(masks) if masks else torch.zeros(0, size, size, dtype=torch.bool)


def painting_labels(documents: Sequence[Document], *, reader: str = "eyes") -> Tensor:
    """What a reader knows of each picture before it is painted: (I, N) int64.

    The pictures are those of all documents in order. Of a document without scenes, and of a picture without
    anything before it, nothing is known.

    Args:
        reader: "words" knows what the words before the picture tell; "eyes" also the badge and pattern of
            whoever stands in an earlier picture of the document; "truth" all that the picture shows.
    """
    assert reader in ("words", "eyes", "truth"), f"no such reader: {reader}"
    rows = []
    for document in documents:
        scenes = [scene_from_record(record) for record in document.meta.get("scenes", ())]
        is_map_first = document.meta.get("task") == "segmentation"
        seen: set[str] = set()
        images = [index for index, part in enumerate(document.parts) if isinstance(part, Image)]
        for number, index in enumerate(images):
            if not scenes or index == 0:
                rows.append([NOT_THERE] * len(SIZES))
            else:
                names = {figure.character.name for figure in scenes[number].figures}
                unknown = frozenset() if reader == "truth" else frozenset(names - seen)
                rows.append(scene_labels(scenes[number], unknown))
            if scenes and reader == "eyes" and not is_map_first:
                seen |= {figure.character.name for figure in scenes[number].figures}
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(SIZES))


def naming_losses(answers: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Mean cross-entropy of each attribute, over the pictures that have it (0 if none has).

    Args:
        answers: (I, sum(SIZES)) logits.
        labels: (I, N), see `scene_labels`.
    """
    return {
        name: F.cross_entropy(logits_IA, labels_I, ignore_index=NOT_THERE, reduction="sum")
        / (labels_I != NOT_THERE).sum().clamp(min=1)
        for name, logits_IA, labels_I in zip(
            NAMES, answers.float().split(SIZES, dim=1), labels.T, strict=True
        )
    }


def mean_loss(losses: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """Mean over the attributes whose name begins with the prefix."""
    return torch.stack([loss for name, loss in losses.items() if name.startswith(prefix)]).mean()


class SceneCode:
    """A fixed code of what a picture shows, in the shape of an image's conditioning.

    Each attribute has half a vector: one of some random ones, by its answer, or the one that says "not
    told". The U-Net can learn to paint from codes, and the language model to write them, before they meet.

    Args:
        num_vectors, dim: shape of the conditioning; it has room for `2 * num_vectors` attributes.
    """

    def __init__(self, num_vectors: int, dim: int) -> None:
        if 2 * num_vectors < len(SIZES):
            raise UsageError(
                f"sizes.num_conditioning {num_vectors}: a scene's code needs {(len(SIZES) + 1) // 2} vectors"
            )
        generator = torch.Generator().manual_seed(0)
        sizes = [*SIZES, *[0] * (2 * num_vectors - len(SIZES))]
        self.num_vectors = num_vectors
        # Row 0 says "not told". Each row has mean 0 and deviation 1, as what a LayerNorm puts out.
        self.tables = [
            F.layer_norm(torch.randn(size + 1, dim // 2, generator=generator), (dim // 2,)) for size in sizes
        ]

    def encode(self, labels: Tensor) -> Tensor:
        """Codes (I, num_vectors, dim) of labels (I, N), see `scene_labels`."""
        row_IN = torch.where(labels == NOT_THERE, 0, labels + 1)
        row_IN = F.pad(row_IN, (0, len(self.tables) - row_IN.shape[1]))
        halves = [table[row_I] for table, row_I in zip(self.tables, row_IN.T, strict=True)]
        return torch.stack(halves, dim=1).view(len(labels), self.num_vectors, -1)

    def answers(self, conditioning: Tensor) -> Tensor:
        """Logits (I, sum(SIZES)) of all answers: how much a conditioning resembles the code of each."""
        half_INd = conditioning.reshape(len(conditioning), len(self.tables), -1)
        sharpness = 8.0 / half_INd.shape[-1]
        logits = [
            sharpness * half_INd[:, n] @ table[1:].T for n, table in enumerate(self.tables[: len(SIZES)])
        ]
        return torch.cat(logits, dim=1)

    def losses(self, conditioning: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far conditionings (I, num_vectors, dim) are from the codes of labels (I, N): scalars.

        "naming" is the cross-entropy of the answers, "distance" the mean square; pictures of which nothing is
        told do not count.
        """
        conditioning = conditioning.float()
        by_name = naming_losses(self.answers(conditioning), labels)
        is_told_I = (labels != NOT_THERE).any(1)
        distance_I = (conditioning - self.encode(labels)).square().mean((1, 2))
        return {
            "naming": mean_loss(by_name),
            "distance": (distance_I * is_told_I).sum() / is_told_I.sum().clamp(min=1),
            "naming_badge": mean_loss(by_name, "badge"),
            "naming_species": mean_loss(by_name, "species"),
        }
