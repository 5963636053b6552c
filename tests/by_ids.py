"""The released code's rules that judge by token ids alone; a `Batch` carries its own answers, by provenance.

The golden inputs are ids without documents, so these make what a batch would bring. Letters: B rows, T tokens
per row.
"""

import torch
from torch import Tensor


def document_starts(input_ids_BT: Tensor, bos: int) -> Tensor:
    """Where, in its row, each token's document begins: at the last bos at or before it, else at 0.

    For ids whose documents are not known otherwise.
    """
    position_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    bos_position_BT = torch.where(input_ids_BT == bos, position_T, 0)
    return bos_position_BT.cummax(dim=1).values


def text_targets(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    bos: int,
    pad: int,
    image_start: int,
    image: int,
    first_target: int | Tensor = 0,
) -> Tensor:
    """Which tokens count in the text loss, judged by ids alone, as the released training did.

    All but padding, slots, bos, an image start directly after bos, and positions before `first_target`.

    Args:
        first_target: of every row, or (B, 1), of each.

    Returns:
        (B, T) bool.
    """
    position_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    after_bos_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    after_bos_BT[:, 1:] = input_ids_BT[:, :-1] == bos
    is_ignored_BT = (input_ids_BT == pad) | (input_ids_BT == image) | (input_ids_BT == bos)
    is_ignored_BT |= (input_ids_BT == image_start) & after_bos_BT
    return attention_mask_BT.bool() & ~is_ignored_BT & (position_T >= first_target)


def targets_after_an_image(input_ids_BT: Tensor, bos: int, image_start: int) -> Tensor:
    """Which tokens the released training counts in data sets of its ignore list (image and caption pairs).

    Those whose document has begun an image: at or before them, so that an image start counts by itself. The
    end of a document without any image does not.

    Returns:
        (B, T) bool.
    """
    images_so_far_BT = (input_ids_BT == image_start).cumsum(dim=1)
    before_BT = torch.nn.functional.pad(images_so_far_BT, (1, 0))
    images_before_document_BT = before_BT.gather(1, document_starts(input_ids_BT, bos))
    return images_so_far_BT > images_before_document_BT
