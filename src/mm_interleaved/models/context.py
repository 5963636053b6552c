"""The context of an image: what the language model said before it, as the image decoder reads it.

Letters: B rows, T tokens, D hidden channels, I images of all rows, C context tokens.
"""

import torch
from torch import Tensor

from mm_interleaved.models.positions import sincos_1d_table


def gather_contexts(
    hidden_BTD: Tensor, row_I: Tensor, start_I: Tensor, end_I: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states from a document's start to an image's start token, inclusive and reversed.

    Reversed, the image's own start token always stands first, however long the document is.

    Args:
        row_I, start_I, end_I: int64, row of the image, first token of its document, its image-start token.

    Returns:
        (I, C, D), zero beyond each context, and the bool mask (I, C), True inside; C is the longest context.
    """
    length_I = end_I - start_I + 1
    steps_C = torch.arange(int(length_I.max()) if len(length_I) else 0, device=hidden_BTD.device)
    mask_IC = steps_C < length_I[:, None]
    position_IC = (end_I[:, None] - steps_C).clamp(min=0)
    context_ICD = hidden_BTD[row_I[:, None], position_IC]
    return context_ICD * mask_IC[..., None].to(context_ICD.dtype), mask_IC


def add_distances(context_ICD: Tensor) -> Tensor:
    """Add a sine-cosine table of the distance to the image-start token."""
    _, length, dim = context_ICD.shape
    return context_ICD + sincos_1d_table(length, dim, device=context_ICD.device, dtype=context_ICD.dtype)
