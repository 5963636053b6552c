"""The stage that teaches the vision tower to name what it sees, before a language model listens to it.

It stands where the released model takes CLIP's weights: a tower that knows nothing gives the language model
nothing to listen to, and both wait for each other for thousands of steps.
Letters: I images, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.storyworld.renderer import render_scene, scene_at
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.naming import SIZES, mean_loss, naming_losses, scene_labels


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
        self.readers = nn.ModuleList(nn.Linear(number * dim, sum(SIZES)) for number in cells)

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
            losses = naming_losses(reader(level_ICyx.flatten(1)), batch.labels)
            size = level_ICyx.shape[-1]
            named |= {f"naming{size}": mean_loss(losses), f"badge{size}": mean_loss(losses, "badge")}
        total = torch.stack([loss for name, loss in named.items() if name.startswith("naming")]).sum()
        return Losses(total=total, named=named, counts={"images": len(batch.pixels)}, document_ids=batch.ids)
