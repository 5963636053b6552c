"""The stage that teaches the vision tower and its slots to name what they see, before anybody listens.

It stands where the released model takes the weights of CLIP and of a pretrained resampler: slots that tell
nothing give the language model nothing to listen to, and both wait for each other for thousands of steps.
Letters: I images, C channels, S slots, D their channels, A answers of all attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.storyworld.renderer import render_scene, scene_at
from mm_interleaved.storyworld.world import POSITIONS
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.naming import (
    IS_ONLY_SEEN,
    NOT_THERE,
    SIZES,
    SIZES_AT_POSITION,
    mean_loss,
    naming_losses,
    scene_labels,
)


@dataclass(frozen=True, slots=True)
class NamedPictures:
    """Pictures and what is to be named in them."""

    pixels: Tensor
    """(I, 3, 64, 64) float32 in [0, 1]."""
    labels: Tensor
    """(I, number of attributes) int64."""
    ids: tuple[str, ...]


class SlotReader(nn.Module):
    """Logits of all attributes out of slots, (I, S, D) → (I, sum(SIZES)).

    Three slots tell of the three positions, all in the same code, and one of the setting, so that whoever
    listens has one code to learn. Fewer than four slots tell together.
    """

    def __init__(self, num_slots: int, slot_dim: int) -> None:
        super().__init__()
        self.num_positions = len(POSITIONS) if num_slots > len(POSITIONS) else 0
        if self.num_positions:
            self.at_position = nn.Linear(slot_dim, sum(SIZES_AT_POSITION))
            self.setting = nn.Linear(slot_dim, sum(SIZES) - self.num_positions * sum(SIZES_AT_POSITION))
        else:
            self.together = nn.Linear(num_slots * slot_dim, sum(SIZES))

    def forward(self, slots_ISD: Tensor) -> Tensor:
        if not self.num_positions:
            return self.together(slots_ISD.flatten(1))
        at_position_IA = self.at_position(slots_ISD[:, : self.num_positions]).flatten(1)
        return torch.cat([at_position_IA, self.setting(slots_ISD[:, self.num_positions])], dim=1)


class VisionSideStage:
    """Trains the tower through linear readers of its pyramid's levels of 16 and 8 cells and of its slots; the
    readers are thrown away.

    Badges and patterns are not to be read from the slots: the few slots are for what a picture is about, the
    pyramid is for its details.
    """

    name = "vision"

    def __init__(self, vision: VisionTower, *, dim: int, grid_size: int, seed: int, batch_size: int) -> None:
        self.vision, self.seed, self.batch_size = vision, seed, batch_size
        num_slots, slot_dim = vision.resampler.queries.shape[-2], vision.slot_projection.out_features
        self.readers = nn.ModuleDict({
            "16": nn.Sequential(nn.Flatten(), nn.Linear((2 * grid_size) ** 2 * dim, sum(SIZES))),
            "8": nn.Sequential(nn.Flatten(), nn.Linear(grid_size**2 * dim, sum(SIZES))),
            "slots": SlotReader(num_slots, slot_dim),
        })  # fmt: skip

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
        seen = self.vision(batch.pixels)
        read = {"16": seen.pyramid[1], "8": seen.pyramid[2], "slots": seen.slots}
        named: dict[str, Tensor] = {}
        for name, features in read.items():
            is_hidden_N = IS_ONLY_SEEN & (name == "slots")
            labels_IN = batch.labels.masked_fill(is_hidden_N, NOT_THERE)
            losses = naming_losses(self.readers[name](features), labels_IN)
            named |= {f"naming_{name}": mean_loss(losses), f"badge_{name}": mean_loss(losses, "badge")}
        total = torch.stack([loss for name, loss in named.items() if name.startswith("naming")]).sum()
        return Losses(total=total, named=named, counts={"images": len(batch.pixels)}, document_ids=batch.ids)
