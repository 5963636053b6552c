"""The stage that teaches the U-Net to paint from codes of scenes, without a language model.

It stands where the released model takes Stable Diffusion's weights: a U-Net that already knows how a
conditioning becomes a picture.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from mm_interleaved.recipes.storyworld.attribute_embedding import SceneCode
from mm_interleaved.recipes.storyworld.attribute_supervision import IS_ONLY_SEEN, NOT_THERE, true_labels
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.denoising_stage import PaintingStage

_SILENT = 0.3
"""Share of the pictures whose codes tell no more than words could."""


class PainterStage(PaintingStage):
    """Trains the U-Net and its synchronizers on pictures of documents, conditioned on their scenes' codes.

    A code mostly tells all that the picture shows. In the rest it is silent about badges and patterns, as
    words are: the U-Net has to look for them in earlier pictures, or to invent them.
    """

    name = "painter"

    @cached_property
    def _code(self) -> SceneCode:
        return SceneCode.of(self.model.image_decoder)

    def trained_parts(self) -> Mapping[str, nn.Module]:
        decoder = self.model.image_decoder
        parts = {"unet": decoder.unet, "negative": nn.ParameterList([decoder.negative_conditioning])}
        return parts if decoder.synchronizers is None else {**parts, "synchronizers": decoder.synchronizers}

    def read_contexts(self, documents: DocumentBatch) -> list[Tensor]:
        """The labels of each picture, (1, N)."""
        labels_IN = true_labels(documents.documents).to(documents.batch.pixel_values.device)
        return [labels_N[None] for labels_N in labels_IN]

    def condition(self, contexts: list[Tensor]) -> Tensor:
        labels_IN = torch.cat(contexts).long()
        device = labels_IN.device
        is_silent_I1 = torch.rand(len(labels_IN), 1, device=device, dtype=torch.float32) < _SILENT
        return self._code.encode(labels_IN.masked_fill(is_silent_I1 & IS_ONLY_SEEN.to(device), NOT_THERE))
