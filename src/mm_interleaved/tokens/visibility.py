"""Who may look at whom, and what counts.

A row packs several documents; looking must never cross a document border. All of it is pure functions of
positions.
Letters: B rows, T tokens per row, N images per row (padded with NO_IMAGE = -1), I images of the batch in
row-major order (all of row 0, then all of row 1, ...), K context images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_IMAGE = -1
IGNORED = -100
"""The label that cross entropy leaves out (torch's default)."""
SHORTEST_CONTEXT = 2
"""Tokens of a context that holds nothing: the document's start and the image-start token."""


def visible_images(document_start_BT: Tensor, image_start_BN: Tensor, first_position: int = 0) -> Tensor:
    """Which images each token may look at: those begun, in its own document.

    An image's slots see their image; its start token does not: there the image is still to come.

    Args:
        document_start_BT: index, within the row, of the first token of each token's document.
        image_start_BN: index, within the row, of each image's start token; its first slot is the next.
        first_position: index, within the row, of the first of the T tokens (behind a cache, not 0).

    Returns:
        (B, T, N) bool, True where the token may look.
    """
    position_T = first_position + torch.arange(document_start_BT.shape[1], device=document_start_BT.device)
    begun_BTN = image_start_BN[:, None, :] < position_T[None, :, None]
    same_document_BTN = image_start_BN[:, None, :] >= document_start_BT[:, :, None]
    # NO_IMAGE is negative and a document starts at 0 or later, so padding already fails here.
    return begun_BTN & same_document_BTN


def relative_image_index(visible_BTN: Tensor) -> Tensor:
    """How far back each image is: 1 for the newest visible one, 2 for the one before, 0 for a hidden one.

    Images stand in their row's order along N. Returns (B, T, N) int64.
    """
    seen_so_far_BTN = visible_BTN.cumsum(dim=-1)
    visible_count_BT1 = seen_so_far_BTN[..., -1:] if visible_BTN.shape[-1] else seen_so_far_BTN
    return (visible_count_BT1 + 1 - seen_so_far_BTN) * visible_BTN


def isolated_causal_mask(document_start_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """Self-attention of packed rows: each token sees its own document up to itself.

    Every token sees itself, padding too, so that no softmax is taken over nothing.

    Args:
        attention_mask_BT: False where a token is padding.

    Returns:
        (B, 1, T, T) bool: [b, 0, i, j] is True where token i may look at token j.
    """
    position_T = torch.arange(document_start_BT.shape[1], device=document_start_BT.device)
    not_later_TT = position_T[None, :] <= position_T[:, None]
    same_document_BTT = position_T[None, None, :] >= document_start_BT[:, :, None]
    mask_BTT = not_later_TT & same_document_BTT
    if attention_mask_BT is not None:
        mask_BTT = mask_BTT & attention_mask_BT[:, None, :].bool()
    itself_TT = position_T[None, :] == position_T[:, None]
    return (mask_BTT | itself_TT)[:, None]


def context_images(
    document_start_BT: Tensor,
    image_start_BN: Tensor,
    rule: str | Sequence[int],
    max_images: int,
) -> Tensor:
    """Which earlier images the decoder of each image attends to.

    Args:
        rule: `"previous"`, the one image directly before (the released checkpoint); `"all"`, the newest
            `max_images` before it (the paper); or the indices, within its document, of the images wanted, of
            which only those before it are taken.
        max_images: how many images the image decoder can tell apart. Of more, the newest are taken.

    Returns:
        (I, K) int64, indices into the I images of the batch, oldest first, padded behind with NO_IMAGE. K is
        the largest number that any image has, at least 1. Never an image of another document, never itself.
    """
    wanted_II = _earlier_images(document_start_BT, image_start_BN)
    if rule == "previous":
        max_images = 1
    elif not isinstance(rule, str):
        index_in_document_I = wanted_II.sum(dim=1)
        chosen_I = torch.isin(index_in_document_I, torch.as_tensor(list(rule), device=wanted_II.device))
        wanted_II = wanted_II & chosen_I[None, :]
    elif rule != "all":
        raise ValueError(f"context_images: expected 'previous', 'all' or image indices, found {rule!r}")
    # 1. Keep the newest.
    newest_first_II = wanted_II.flip(1).cumsum(dim=1).flip(1)
    wanted_II = wanted_II & (newest_first_II <= max_images)
    # 2. Move them to the front of each line, in order.
    count_I = wanted_II.sum(dim=1)
    num_context = max(1, int(count_I.max())) if len(count_I) else 1
    order_IK = torch.argsort((~wanted_II).to(torch.int8), dim=1, stable=True)[:, :num_context]
    is_context_IK = torch.arange(order_IK.shape[1], device=order_IK.device) < count_I[:, None]
    return order_IK.masked_fill(~is_context_IK, NO_IMAGE)


def announced_images(document_start_BT: Tensor, image_start_BN: Tensor) -> Tensor:
    """Which images something stands before: (I,) bool.

    A context of the document's start and the image's own start token alone holds nothing about the image, so
    such images do not count in the image loss.
    """
    document_start_BN = document_start_BT.gather(1, image_start_BN.clamp(min=0))
    is_announced_BN = image_start_BN - document_start_BN + 1 > SHORTEST_CONTEXT
    return is_announced_BN[image_start_BN != NO_IMAGE]


def next_token_labels(input_ids_BT: Tensor, text_target_BT: Tensor) -> Tensor:
    """What each token has to predict: the next one where that counts, IGNORED elsewhere.

    Documents of a row need no further care: a document's first token is bos, which never counts.

    Returns:
        (B, T) int64; the last column is IGNORED.
    """
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    labels_BT[:, :-1] = input_ids_BT[:, 1:].masked_fill(~text_target_BT[:, 1:], IGNORED)
    return labels_BT


def _earlier_images(document_start_BT: Tensor, image_start_BN: Tensor) -> Tensor:
    """(I, I) bool: [i, j] is True where image j comes before image i in the same document."""
    is_image_BN = image_start_BN != NO_IMAGE
    row_BN = torch.arange(image_start_BN.shape[0], device=image_start_BN.device)[:, None].expand_as(
        image_start_BN
    )
    row_I, start_I = row_BN[is_image_BN], image_start_BN[is_image_BN]
    document_start_I = document_start_BT[row_I, start_I]
    same_row_II = row_I[:, None] == row_I[None, :]
    same_document_II = same_row_II & (start_I[None, :] >= document_start_I[:, None])
    return same_document_II & (start_I[None, :] < start_I[:, None])
