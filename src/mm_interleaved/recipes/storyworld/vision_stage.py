"""The stage that teaches the vision tower and its slots to name what they see, before anybody listens.

It stands where the released model takes the weights of CLIP and of a pretrained resampler: slots that tell
nothing give the language model nothing to listen to, and both wait for each other for thousands of steps.
Letters: I images, C channels, S slots, D their channels, N attributes, s cells a side of a level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    AT_POSITION,
    IS_ONLY_SEEN,
    NOT_THERE,
    SIZES,
    SIZES_AT_POSITION,
    cell_labels,
    known_cross_entropy,
    mean_loss,
    naming_losses,
    scene_labels,
)
from mm_interleaved.storyworld.renderer import render_batch, scene_at
from mm_interleaved.storyworld.world import POSITIONS
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.loop import Losses
from mm_interleaved.training.parameter_groups import LinearProbe

LEVELS = (0, 1, 2)
"""Levels of the pyramid that are read: those into which synchronizers look."""


@dataclass(frozen=True, slots=True)
class NamedPictures:
    """Pictures and what is to be named in them."""

    pixels: Tensor
    """(I, 3, 64, 64) float32 in [0, 1]."""
    labels: Tensor
    """(I, N) int64, see `scene_labels`."""
    ids: tuple[str, ...]
    cells: tuple[Tensor, ...] = ()
    """For each level that is read (I, attributes of a position, s, s) int64, see `cell_labels`."""

    def to(self, device: torch.device) -> "NamedPictures":
        """The same on a device."""
        cells = tuple(level.to(device) for level in self.cells)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), cells=cells)


class SlotReader(nn.Module):
    """Logits of all attributes out of any number of slots, (I, S, D) → (I, sum(SIZES)).

    As many slots as can be are divided evenly over the three positions, which are told in the same code, so
    that whoever listens has one code to learn; the rest, at least one, tell of the setting. Fewer than four
    slots tell everything together.
    """

    def __init__(self, num_slots: int, slot_dim: int) -> None:
        super().__init__()
        self.slots_at_position = (num_slots - 1) // len(POSITIONS)
        num_placed = self.slots_at_position * len(POSITIONS)
        if num_placed:
            self.at_position = LinearProbe(self.slots_at_position * slot_dim, sum(SIZES_AT_POSITION))
            in_setting = sum(SIZES) - len(POSITIONS) * sum(SIZES_AT_POSITION)
            self.setting = LinearProbe((num_slots - num_placed) * slot_dim, in_setting)
        else:
            self.together = LinearProbe(num_slots * slot_dim, sum(SIZES))

    def forward(self, slots_ISD: Tensor) -> Tensor:
        if not self.slots_at_position:
            return self.together(slots_ISD.flatten(1))
        num_placed = self.slots_at_position * len(POSITIONS)
        placed_IPd = slots_ISD[:, :num_placed].unflatten(1, (len(POSITIONS), -1)).flatten(2)
        setting_Id = slots_ISD[:, num_placed:].flatten(1)
        return torch.cat([self.at_position(placed_IPd).flatten(1), self.setting(setting_Id)], dim=1)


def named_pictures(seed: int, step: int, batch_size: int, levels: Sequence[int] = ()) -> NamedPictures:
    """The pictures of a step, with the cells of these levels of the pyramid."""
    first = step * batch_size
    scenes = [scene_at("train", seed, first + i) for i in range(batch_size)]
    pixels = torch.from_numpy(render_batch(seed, first, batch_size))
    size = pixels.shape[1]
    return NamedPictures(
        pixels=pixels.permute(0, 3, 1, 2).float() / 255,
        labels=torch.tensor([scene_labels(scene) for scene in scenes]),
        cells=tuple(
            torch.stack([cell_labels(scene, size // (2 << level)) for scene in scenes]) for level in levels
        ),
        ids=tuple(f"scene-{seed}-{first + i}" for i in range(batch_size)),
    )


class VisionSideStage:
    """Trains the tower through linear readers of its pyramid and of its slots; the readers are thrown away.

    Each cell of the pyramid has to name the figure or thing on which it lies, in the same code wherever that
    is and on whatever level: a synchronizer projects all cells by one matrix, so it can only use what all
    cells say alike, and whoever samples anywhere on a figure learns who it is. (Readers that took a level as
    a whole were right as well, each cell in a code of its own; nothing ever learned to look at badges then.)
    Badges and patterns are not to be read from the slots: the few slots are for what a picture is about, the
    pyramid is for its details.
    """

    name = "vision"

    def __init__(self, vision: VisionTower, *, seed: int, batch_size: int) -> None:
        self.vision, self.seed, self.batch_size = vision, seed, batch_size
        num_slots, slot_dim = vision.resampler.queries.shape[-2], vision.slot_projection.out_features
        self.readers = nn.ModuleDict({
            "cells": LinearProbe(vision.token_projection.in_features, sum(SIZES_AT_POSITION)),
            "slots": SlotReader(num_slots, slot_dim),
        }).to(device_of(vision))  # fmt: skip

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {"vision": self.vision, "readers": self.readers}

    def make_batch(self, step: int) -> NamedPictures:
        return named_pictures(self.seed, step, self.batch_size, LEVELS).to(device_of(self.vision))

    def compute_losses(self, batch: NamedPictures) -> Losses:
        with fast_attention(batch.pixels.device):
            seen = self.vision(batch.pixels)
        labels_IN = batch.labels.masked_fill(IS_ONLY_SEEN.to(batch.labels.device), NOT_THERE)
        read = naming_losses(self.readers["slots"](seen.slots), labels_IN)
        named = {"slots": mean_loss(read)}
        badges = []
        for level, labels in zip(LEVELS, batch.cells, strict=True):
            losses = self._read_cells(seen.pyramid[level], labels)
            named[f"cells_{labels.shape[-1]}"] = torch.stack(losses).mean()
            badges.append(losses[AT_POSITION.index("badge")])
        total = torch.stack(list(named.values())).sum()
        named["badge"] = torch.stack(badges).mean()
        return Losses(total=total, named=named, counts={"images": len(batch.pixels)}, document_ids=batch.ids)

    def _read_cells(self, cells_ICss: Tensor, labels: Tensor) -> list[Tensor]:
        """Loss of each attribute of a position, over the cells that have it (0 if none has)."""
        answers = self.readers["cells"](cells_ICss.movedim(1, -1)).float().movedim(-1, 1)
        return [
            known_cross_entropy(answer, label_Iss)
            for answer, label_Iss in zip(answers.split(SIZES_AT_POSITION, 1), labels.unbind(1), strict=True)
        ]
