"""The context of each image for the image decoder, in a training pass and in generation alike."""

from torch import Tensor

from mm_interleaved.models.context import add_distances, gather_contexts
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.visibility import NO_IMAGE


def gathered(
    model: MMInterleavedForConditionalGeneration, hidden: Tensor, image_start: Tensor, document_start: Tensor
) -> tuple[Tensor, Tensor]:
    """Context features (I, C, D) and their mask (I, C), 1 inside.

    Args:
        hidden: (B, T, D) final hidden states.
        image_start: (B, N), `NO_IMAGE` where a row has no image.
        document_start: (B, T) first token of each token's document.
    """
    row, column = (image_start != NO_IMAGE).nonzero(as_tuple=True)
    end = image_start[row, column]
    context, mask = gather_contexts(hidden, row, document_start[row, end], end)
    return add_distances(model.context_projection(context)), mask.long()
