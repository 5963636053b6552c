"""The image stage: the image decoder learns to generate images from documents, and to keep what earlier ones
show.

It trains the context projection, the conditioning's resampler, the U-Net and its synchronizers by the
denoising loss (paper, section 3.3); the language model and the vision tower stay as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mm_interleaved.models.context import add_distances, gather_contexts
from mm_interleaved.recipes.storyworld.batches import DocumentBatch
from mm_interleaved.recipes.storyworld.denoising_stage import DenoisingStage
from mm_interleaved.recipes.storyworld.text_stage import read_batch
from mm_interleaved.tokens.visibility import NO_IMAGE


class ImageStage(DenoisingStage):
    """Trains the image decoder on the hidden states of the frozen language model."""

    name = "image"

    def trained_parts(self) -> Mapping[str, nn.Module]:
        return {
            "image_decoder": self.model.image_decoder,
            "context_projection": self.model.context_projection,
        }

    def read_contexts(self, documents: DocumentBatch) -> list[Tensor]:
        """Hidden states from each image-start token back to the document's start."""
        batch = documents.batch
        hidden_BTD = read_batch(self.model, batch)
        row_I, column_I = (batch.image_start != NO_IMAGE).nonzero(as_tuple=True)
        end_I = batch.image_start[row_I, column_I]
        start_I = batch.document_start[row_I, end_I]
        # In float32: pools are kept longer than a step, and trained on outside this autocast.
        context_ICD, mask_IC = gather_contexts(hidden_BTD.float(), row_I, start_I, end_I)
        return [context_CD[mask_C] for context_CD, mask_C in zip(context_ICD, mask_IC, strict=True)]

    def condition(self, contexts: list[Tensor]) -> Tensor:
        context_ICD = pad_sequence(contexts, batch_first=True)
        device = context_ICD.device
        length_I = torch.tensor([len(context) for context in contexts], device=device)
        mask_IC = torch.arange(context_ICD.shape[1], device=device) < length_I[:, None]
        context_ICD = add_distances(self.model.context_projection(context_ICD))
        return self.model.image_decoder.condition(context_ICD, mask_IC)
