"""The stage that teaches the vision tower to name what it sees, before a language model listens to it.

It stands where the released model takes CLIP's weights: a tower that knows nothing gives the language model
nothing to
listen to, and both wait for each other for thousands of steps.
Letters: I images, C channels, A answers of one attribute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.storyworld.renderer import render_scene, scene_at
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
)
from mm_interleaved.training.loop import Losses

NOT_THERE = -100
_NOBODY = "nobody"

_AT_POSITION: dict[str, Sequence[str]] = {
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
_NAMES = [f"{name}@{position}" for position in POSITIONS for name in _AT_POSITION] + list(_SETTING)
_SIZES = [len(answers) for _ in POSITIONS for answers in _AT_POSITION.values()]
_SIZES += [len(answers) for answers in _SETTING.values()]


def scene_labels(scene: Scene) -> list[int]:
    """For each attribute at each position, and of the setting, the number of its answer, or NOT_THERE."""
    labels = []
    for position in POSITIONS:
        figure = next((figure for figure in scene.figures if figure.position == position), None)
        prop = next((prop for prop in scene.props if prop.position == position), None)
        values = {"species": _NOBODY, "prop": _NOBODY}
        if figure is not None:
            for name in ("species", "body_colour", "pattern", "hat", "hat_colour", "badge"):
                values[name] = getattr(figure.character, name)
            values["action"] = figure.action
        if prop is not None:
            values["prop"], values["prop_colour"] = prop.kind, prop.colour
        for name, answers in _AT_POSITION.items():
            value = values.get(name)
            labels.append(answers.index(value) if value in answers else NOT_THERE)
    return labels + [answers.index(getattr(scene, name)) for name, answers in _SETTING.items()]


@dataclass(frozen=True, slots=True)
class NamedPictures:
    """Pictures and what is to be named in them."""

    pixels: Tensor
    """(I, 3, 64, 64) float32 in [0, 1]."""
    labels: Tensor
    """(I, number of attributes) int64."""
    ids: tuple[str, ...]


class VisionSideStage:
    """Trains the tower through linear readers of its pyramid's levels of 16 and 8 cells, which are thrown
    away.
    """

    name = "vision"

    def __init__(self, vision: VisionTower, *, dim: int, grid_size: int, seed: int, batch_size: int) -> None:
        self.vision, self.seed, self.batch_size = vision, seed, batch_size
        cells = ((2 * grid_size) ** 2, grid_size**2)
        self.readers = nn.ModuleList(nn.Linear(number * dim, sum(_SIZES)) for number in cells)

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {"vision": self.vision, "readers": self.readers}

    def make_batch(self, step: int) -> NamedPictures:
        first = step * self.batch_size
        scenes = [scene_at("train", self.seed, first + i) for i in range(self.batch_size)]
        pixels = torch.from_numpy(np.stack([render_scene(scene) for scene in scenes]))
        return NamedPictures(
            pixels=pixels.permute(0, 3, 1, 2).float() / 255,
            labels=torch.tensor([scene_labels(scene) for scene in scenes]),
            ids=tuple(f"scene-{self.seed}-{first + i}" for i in range(self.batch_size)),
        )

    def compute_losses(self, batch: NamedPictures) -> Losses:
        pyramid = self.vision(batch.pixels).pyramid
        named: dict[str, Tensor] = {}
        for reader, level_ICyx in zip(self.readers, pyramid[1:3], strict=True):
            answers = reader(level_ICyx.flatten(1)).float().split(_SIZES, dim=1)
            losses = [
                F.cross_entropy(logits_IA, labels_I, ignore_index=NOT_THERE, reduction="sum")
                / (labels_I != NOT_THERE).sum().clamp(min=1)
                for logits_IA, labels_I in zip(answers, batch.labels.T, strict=True)
            ]
            badges = [loss for name, loss in zip(_NAMES, losses, strict=True) if name.startswith("badge")]
            size = level_ICyx.shape[-1]
            named |= {f"naming{size}": torch.stack(losses).mean(), f"badge{size}": torch.stack(badges).mean()}
        total = sum(loss for name, loss in named.items() if name.startswith("naming"))
        return Losses(total=total, named=named, counts={"images": len(batch.pixels)}, document_ids=batch.ids)
