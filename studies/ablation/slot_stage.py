"""The stage that teaches slots of any number to tell all that a picture shows; what sees stays as it is.

In the shipped model slots leave badges and patterns to the pyramid (`vision_side`). Where slots are compared
with the pyramid they must have a fair chance: here every attribute is asked of them, and as many of them as
there are may hold it.
Letters: I images, S slots, D their channels, N attributes.
"""

from collections.abc import Mapping

from torch import nn

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    IS_ONLY_SEEN,
    NOT_THERE,
    mean_loss,
    naming_losses,
)
from mm_interleaved.recipes.storyworld.vision_stage import NamedPictures, SlotReader, named_pictures
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.loop import Losses


class SlotSideStage:
    """Trains what makes slots out of the tower's tokens, through a linear reader that is thrown away.

    Args:
        are_coarse: badges and patterns are not asked for, as in the shipped model.
    """

    name = "slots"

    def __init__(self, vision: VisionTower, *, seed: int, batch_size: int, are_coarse: bool = False) -> None:
        self.vision, self.seed, self.batch_size, self.are_coarse = vision, seed, batch_size, are_coarse
        reader = SlotReader(vision.resampler.queries.shape[-2], vision.slot_projection.out_features)
        self.reader = reader.to(device_of(vision))
        vision.requires_grad_(False)
        for part in self._slot_parts().values():
            part.requires_grad_(True)

    def _slot_parts(self) -> dict[str, nn.Module]:
        names = ("token_projection", "token_norm", "position_norm", "resampler", "slot_projection")
        return {name: getattr(self.vision, name) for name in names}

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {**self._slot_parts(), "readers": self.reader}

    def make_batch(self, step: int) -> NamedPictures:
        return named_pictures(self.seed, step, self.batch_size).to(device_of(self.vision))

    def compute_losses(self, batch: NamedPictures) -> Losses:
        with fast_attention(batch.pixels.device):
            slots_ISD = self.vision(batch.pixels).slots
        is_left_out_N = (IS_ONLY_SEEN & self.are_coarse).to(batch.labels.device)
        labels_IN = batch.labels.masked_fill(is_left_out_N, NOT_THERE)
        by_name = naming_losses(self.reader(slots_ISD), labels_IN)
        named = {"naming": mean_loss(by_name)}
        named |= {name: mean_loss(by_name, name) for name in ("species", "pattern", "badge", "action")}
        counts = {"images": len(batch.pixels)}
        return Losses(total=named["naming"], named=named, counts=counts, document_ids=batch.ids)
