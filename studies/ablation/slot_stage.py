"""The slot stage: slots of any number learn to hold all that an image shows.

It trains the resampler between the vision tower's tokens and the slots by the cross-entropy of a linear
probe; the tower stays as it is. In the shipped model slots leave badges and patterns to the pyramid (its
vision stage). Where slots are compared with the pyramid they must have a fair chance: here every attribute is
asked of them, and as many of them as there are may hold it.
Letters: I images, S slots, D their channels, N attributes.
"""

from collections.abc import Mapping

from torch import nn

from mm_interleaved.models.vision import VisionTower
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    IS_IMAGE_ONLY,
    NO_LABEL,
    attribute_losses,
    mean_loss,
)
from mm_interleaved.recipes.storyworld.vision_stage import PROBES, LabelledImages, SlotProbe, labelled_images
from mm_interleaved.training.computation import device_of, fast_attention
from mm_interleaved.training.stage import Losses


class SlotStage:
    """Trains what makes slots out of the tower's tokens, through a linear probe that is thrown away.

    Args:
        are_coarse: badges and patterns are not asked for, as in the shipped model.
    """

    name = "slots"

    def __init__(self, vision: VisionTower, *, seed: int, batch_size: int, are_coarse: bool = False) -> None:
        self.vision, self.seed, self.batch_size, self.are_coarse = vision, seed, batch_size, are_coarse
        probe = SlotProbe(vision.resampler.queries.shape[-2], vision.slot_projection.out_features)
        self.probe = probe.to(device_of(vision))
        vision.requires_grad_(False)
        for part in self._slot_parts().values():
            part.requires_grad_(True)

    def _slot_parts(self) -> dict[str, nn.Module]:
        names = ("token_projection", "token_norm", "position_norm", "resampler", "slot_projection")
        return {name: getattr(self.vision, name) for name in names}

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {**self._slot_parts(), PROBES: self.probe}

    def make_batch(self, step: int) -> LabelledImages:
        return labelled_images(self.seed, step, self.batch_size).to(device_of(self.vision))

    def compute_losses(self, batch: LabelledImages) -> Losses:
        with fast_attention(batch.pixels.device):
            slots_ISD = self.vision(batch.pixels).slots
        is_left_out_N = (IS_IMAGE_ONLY & self.are_coarse).to(batch.labels.device)
        labels_IN = batch.labels.masked_fill(is_left_out_N, NO_LABEL)
        by_name = attribute_losses(self.probe(slots_ISD), labels_IN)
        named = {"attributes": mean_loss(by_name)}
        named |= {name: mean_loss(by_name, name) for name in ("species", "pattern", "badge", "action")}
        counts = {"images": len(batch.pixels)}
        return Losses(total=named["attributes"], named=named, counts=counts, document_ids=batch.ids)
