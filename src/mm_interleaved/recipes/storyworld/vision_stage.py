"""The vision stage: the vision tower learns to recognise what images show, before a language model reads it.

It stands where the released model takes the weights of CLIP and of a pretrained resampler: slots without
content give the language model nothing to attend to, and both wait for each other for thousands of steps. It
trains the whole tower (paper, section 3.1) by the cross-entropy of linear probes.
Letters: I images, C channels, S slots, D their channels, N attributes, s cells a side of a level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    ATTRIBUTES_AT_POSITION,
    IS_IMAGE_ONLY,
    NO_LABEL,
    NUM_VALUES,
    NUM_VALUES_AT_POSITION,
    attribute_losses,
    cell_labels,
    known_cross_entropy,
    mean_loss,
    scene_labels,
)
from mm_interleaved.recipes.storyworld.batches import training_images
from mm_interleaved.storyworld.world import POSITIONS
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.parameter_groups import LinearProbe
from mm_interleaved.training.stage import Losses

LEVELS = (0, 1, 2)
"""Levels of the pyramid that are probed: those that synchronizers sample."""
PIXEL_LEVELS = (0, 1)
"""Levels of which `pixel_weight` asks for pixels: 32 and 16 cells a side."""
PROBES = "readers"
"""Name of the linear probes in checkpoints: that of the first release, whose runs can so be resumed."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images and the attributes that they show."""

    pixels: Tensor
    """(I, 3, 64, 64) float32 in [0, 1]."""
    labels: Tensor
    """(I, N) int64, see `scene_labels`."""
    ids: tuple[str, ...]
    cells: tuple[Tensor, ...] = ()
    """For each level that is probed (I, attributes of a position, s, s) int64, see `cell_labels`."""

    def to(self, device: torch.device) -> "LabelledImages":
        """The same on a device."""
        cells = tuple(level.to(device) for level in self.cells)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), cells=cells)


class SlotProbe(nn.Module):
    """Linear probe of any number of slots: logits of all attributes, (I, S, D) → (I, sum(NUM_VALUES)).

    As many slots as can be are divided evenly over the three positions, which are probed by the same weights,
    so that the language model has one code to learn; the rest, at least one, hold the setting. Fewer than
    four slots hold everything together.
    """

    def __init__(self, num_slots: int, slot_dim: int) -> None:
        super().__init__()
        self.slots_at_position = (num_slots - 1) // len(POSITIONS)
        num_placed = self.slots_at_position * len(POSITIONS)
        if num_placed:
            self.at_position = LinearProbe(self.slots_at_position * slot_dim, sum(NUM_VALUES_AT_POSITION))
            in_setting = sum(NUM_VALUES) - len(POSITIONS) * sum(NUM_VALUES_AT_POSITION)
            self.setting = LinearProbe((num_slots - num_placed) * slot_dim, in_setting)
        else:
            self.together = LinearProbe(num_slots * slot_dim, sum(NUM_VALUES))

    def forward(self, slots_ISD: Tensor) -> Tensor:
        if not self.slots_at_position:
            return self.together(slots_ISD.flatten(1))
        num_placed = self.slots_at_position * len(POSITIONS)
        placed_IPd = slots_ISD[:, :num_placed].unflatten(1, (len(POSITIONS), -1)).flatten(2)
        setting_Id = slots_ISD[:, num_placed:].flatten(1)
        return torch.cat([self.at_position(placed_IPd).flatten(1), self.setting(setting_Id)], dim=1)


class PixelProbe(nn.Module):
    """Linear probe that tells of each cell of a level the pixels on which it lies.

    It reads what synchronizers read: cells after a norm, without the scale and shift that one has of its own.

    Args:
        side: pixels of a cell's side.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear = LinearProbe(dim, 3 * side**2)

    def forward(self, cells_ICss: Tensor, pixels_I3HW: Tensor) -> Tensor:
        """Mean square error of pixels in [-1, 1]: a scalar."""
        cells_IssC = cells_ICss.movedim(1, -1)
        told_IPss = self.linear(F.layer_norm(cells_IssC, cells_IssC.shape[-1:])).movedim(-1, 1)
        truth_IPss = F.pixel_unshuffle(2 * pixels_I3HW - 1, self.side)
        return F.mse_loss(told_IPss.float(), truth_IPss)


def labelled_images(
    seed: int, step: int, batch_size: int, levels: Sequence[int] = (), boards: bool = False
) -> LabelledImages:
    """The images of a step, with the cells of these levels of the pyramid.

    Args:
        boards: two of three show a board, which has no labels.
    """
    first = step * batch_size
    scenes, images = training_images(seed, first, batch_size, boards)
    pixels = torch.from_numpy(images)
    size = pixels.shape[1]
    return LabelledImages(
        pixels=pixels.permute(0, 3, 1, 2).float() / 255,
        labels=torch.tensor([scene_labels(scene) for scene in scenes]),
        cells=tuple(
            torch.stack([cell_labels(scene, size // (2 << level)) for scene in scenes]) for level in levels
        ),
        ids=tuple(f"scene-{seed}-{first + i}" for i in range(batch_size)),
    )


class VisionStage:
    """Trains the tower through linear probes of its pyramid and of its slots, which are thrown away.

    Each cell of the pyramid has to hold the figure or thing on which it lies, in the same code wherever that
    is and on whatever level: a synchronizer projects all cells by one matrix, so it can only use what all
    cells express alike, and a sample from anywhere on a figure says who it is. (Probes that took a level as a
    whole were right as well, each cell in a code of its own; nothing ever learned to attend to badges then.)
    Badges and patterns are not probed in the slots: the few slots are for what an image is about, the
    pyramid is for its details.

    Args:
        boards: two of three images show a board.
        pixel_weight: of a further loss, the square error of linear probes that have to tell of each cell of
            the two finest levels the pixels on which it lies. What an image decoder has to copy is then there
            in linear form; a tower that only recognises has no use for it.
    """

    name = "vision"

    def __init__(
        self,
        vision: VisionTower,
        *,
        seed: int,
        batch_size: int,
        boards: bool = False,
        pixel_weight: float = 0.0,
    ) -> None:
        self.vision, self.seed, self.batch_size = vision, seed, batch_size
        self.boards, self.pixel_weight = boards, pixel_weight
        num_slots, slot_dim = vision.resampler.queries.shape[-2], vision.slot_projection.out_features
        self.probes = nn.ModuleDict({
            "cells": LinearProbe(vision.token_projection.in_features, sum(NUM_VALUES_AT_POSITION)),
            "slots": SlotProbe(num_slots, slot_dim),
        }).to(device_of(vision))  # fmt: skip
        if pixel_weight:
            dim = vision.token_projection.in_features
            for level in PIXEL_LEVELS:
                probe = PixelProbe(dim, 2 << level).to(device_of(vision))
                self.probes[f"pixels_{level}"] = probe

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {"vision": self.vision, PROBES: self.probes}

    def make_batch(self, step: int) -> LabelledImages:
        batch = labelled_images(self.seed, step, self.batch_size, LEVELS, self.boards)
        return batch.to(device_of(self.vision))

    def compute_losses(self, batch: LabelledImages) -> Losses:
        with fast_attention(batch.pixels.device):
            features = self.vision(batch.pixels)
        labels_IN = batch.labels.masked_fill(IS_IMAGE_ONLY.to(batch.labels.device), NO_LABEL)
        slot_losses = attribute_losses(self.probes["slots"](features.slots), labels_IN)
        named = {"slots": mean_loss(slot_losses)}
        badges = []
        for level, labels in zip(LEVELS, batch.cells, strict=True):
            losses = self._cell_losses(features.pyramid[level], labels)
            named[f"cells_{labels.shape[-1]}"] = torch.stack(losses).mean()
            badges.append(losses[ATTRIBUTES_AT_POSITION.index("badge")])
        total = torch.stack(list(named.values())).sum()
        if self.pixel_weight:
            errors = [
                self.probes[f"pixels_{level}"](features.pyramid[level], batch.pixels)
                for level in PIXEL_LEVELS
            ]
            named["pixels"] = torch.stack(errors).mean()
            total = total + self.pixel_weight * named["pixels"]
        named["badge"] = torch.stack(badges).mean()
        return Losses(total=total, named=named, counts={"images": len(batch.pixels)}, document_ids=batch.ids)

    def _cell_losses(self, cells_ICss: Tensor, labels: Tensor) -> list[Tensor]:
        """Loss of each attribute of a position, over the cells that have it (0 if none has)."""
        logits = self.probes["cells"](cells_ICss.movedim(1, -1)).float().movedim(-1, 1)
        return [
            known_cross_entropy(logits_IAss, label_Iss)
            for logits_IAss, label_Iss in zip(
                logits.split(NUM_VALUES_AT_POSITION, 1), labels.unbind(1), strict=True
            )
        ]
