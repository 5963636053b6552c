"""The stage that teaches slots of any number to tell all that a picture shows; what sees stays as it is.

In the shipped model slots leave badges and patterns to the pyramid (`vision_side`). Where slots are compared
with the pyramid they must have a fair chance: here every attribute is asked of them, and as many of them as
there are may hold it.
Letters: I images, S slots, D their channels, N attributes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.storyworld.renderer import render_batch, scene_at
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
from mm_interleaved.training.vision_side import NamedPictures


class SharedSlotReader(nn.Module):
    """Logits of all attributes out of any number of slots, (I, S, D) → (I, sum(SIZES)).

    As many slots as can be are divided evenly over the three positions, which are told in the same code; the
    rest, at least one, tell of the setting. Fewer than four slots tell everything together.
    """

    def __init__(self, num_slots: int, slot_dim: int) -> None:
        super().__init__()
        self.slots_at_position = (num_slots - 1) // len(POSITIONS)
        num_placed = self.slots_at_position * len(POSITIONS)
        if num_placed:
            self.at_position = nn.Linear(self.slots_at_position * slot_dim, sum(SIZES_AT_POSITION))
            in_setting = sum(SIZES) - len(POSITIONS) * sum(SIZES_AT_POSITION)
            self.setting = nn.Linear((num_slots - num_placed) * slot_dim, in_setting)
        else:
            self.together = nn.Linear(num_slots * slot_dim, sum(SIZES))

    def forward(self, slots_ISD: Tensor) -> Tensor:
        if not self.slots_at_position:
            return self.together(slots_ISD.flatten(1))
        num_placed = self.slots_at_position * len(POSITIONS)
        placed_IPd = slots_ISD[:, :num_placed].unflatten(1, (len(POSITIONS), -1)).flatten(2)
        setting_Id = slots_ISD[:, num_placed:].flatten(1)
        return torch.cat([self.at_position(placed_IPd).flatten(1), self.setting(setting_Id)], dim=1)


class SlotSideStage:
    """Trains what makes slots out of the tower's tokens, through a linear reader that is thrown away.

    Args:
        are_coarse: badges and patterns are not asked for, as in the shipped model.
    """

    name = "slots"

    def __init__(self, vision: VisionTower, *, seed: int, batch_size: int, are_coarse: bool = False) -> None:
        self.vision, self.seed, self.batch_size, self.are_coarse = vision, seed, batch_size, are_coarse
        self.reader = SharedSlotReader(
            vision.resampler.queries.shape[-2], vision.slot_projection.out_features
        )
        vision.requires_grad_(False)
        for part in self._slot_parts().values():
            part.requires_grad_(True)

    def _slot_parts(self) -> dict[str, nn.Module]:
        names = ("token_projection", "token_norm", "position_norm", "resampler", "slot_projection")
        return {name: getattr(self.vision, name) for name in names}

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {**self._slot_parts(), "readers": self.reader}

    def make_batch(self, step: int) -> NamedPictures:
        first = step * self.batch_size
        scenes = [scene_at("train", self.seed, first + i) for i in range(self.batch_size)]
        pixels = torch.from_numpy(render_batch(self.seed, first, self.batch_size))
        return NamedPictures(
            pixels=pixels.permute(0, 3, 1, 2).float() / 255,
            labels=torch.tensor([scene_labels(scene) for scene in scenes]),
            ids=tuple(f"scene-{self.seed}-{first + i}" for i in range(self.batch_size)),
        )

    def compute_losses(self, batch: NamedPictures) -> Losses:
        with sdpa_kernel(SDPBackend.MATH):  # see text_side
            slots_ISD = self.vision(batch.pixels).slots
        labels_IN = batch.labels.masked_fill(IS_ONLY_SEEN & self.are_coarse, NOT_THERE)
        by_name = naming_losses(self.reader(slots_ISD), labels_IN)
        named = {"naming": mean_loss(by_name)}
        named |= {name: mean_loss(by_name, name) for name in ("species", "pattern", "badge", "action")}
        counts = {"images": len(batch.pixels)}
        return Losses(total=named["naming"], named=named, counts=counts, document_ids=batch.ids)
