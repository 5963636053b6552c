"""The U-Net stage: the U-Net learns to generate images from attribute embeddings, without a language model.

It stands where the released model takes Stable Diffusion's weights: a U-Net that already knows how a
conditioning becomes an image. It trains the U-Net, its synchronizers and the conditioning of no context by
the denoising loss (paper, section 3.3).
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import IS_IMAGE_ONLY, NO_LABEL, true_labels
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.board_supervision import NUM_BOARD_VALUES, board_labels
from mm_interleaved.recipes.storyworld.denoising_stage import DenoisingStage

_STATED_ONLY = 0.3
"""Share of the images whose embeddings hold no more than text could state."""


class UNetStage(DenoisingStage):
    """Trains the U-Net and its synchronizers on images of documents, conditioned on their attributes.

    Mostly an embedding holds all that the image shows. In the rest it lacks badges and patterns, as text
    does: the U-Net has to find them in earlier images, or to invent them. What a board shows no embedding
    holds; it says how the board hangs, and hung before.
    """

    name = "unet"
    stated_only = _STATED_ONLY

    @cached_property
    def _embedding(self) -> AttributeEmbedding:
        return AttributeEmbedding.of(self.model.image_decoder, NUM_BOARD_VALUES if self.boards else ())

    def trained_parts(self) -> Mapping[str, nn.Module]:
        decoder = self.model.image_decoder
        parts = {"unet": decoder.unet, "negative": nn.ParameterList([decoder.negative_conditioning])}
        return parts if decoder.synchronizers is None else {**parts, "synchronizers": decoder.synchronizers}

    def read_contexts(self, documents: DocumentBatch) -> list[Tensor]:
        """The labels of each image, (1, N)."""
        labels_IN = true_labels(documents.documents)
        if self.boards:
            labels_IN = torch.cat([labels_IN, board_labels(documents.documents)], dim=1)
        labels_IN = labels_IN.to(documents.batch.pixel_values.device)
        # As a context of one token: pools hold the same kind of example for both denoising stages.
        return [labels_N[None] for labels_N in labels_IN]

    def condition(self, contexts: list[Tensor]) -> Tensor:
        labels_IN = torch.cat(contexts).long()
        device = labels_IN.device
        chance_I1 = torch.rand(len(labels_IN), 1, device=device, dtype=torch.float32)
        is_image_only_N = F.pad(IS_IMAGE_ONLY, (0, labels_IN.shape[1] - len(IS_IMAGE_ONLY))).to(device)
        is_unknown_IN = (chance_I1 < self.stated_only) & is_image_only_N
        return self._embedding.encode(labels_IN.masked_fill(is_unknown_IN, NO_LABEL))


class LookingStage(UNetStage):
    """Trains the same before, on embeddings that hold no more than text could state, without exception.

    What the embedding holds in seven of ten images a U-Net takes from there, and then from there alone: after
    5,900 steps version 5's looked at nothing. A small one that never had another way laid 99 % of the
    synchronizers' weight on the right place after 150 (LOG.md).
    """

    name = "looking"
    stated_only = 1.0
