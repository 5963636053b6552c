"""The synchronizer's arithmetic where tensors have shapes and no numbers, to count what it takes.

All samples of all images and levels in one call of `grid_sample`, as many as `reference` takes in a loop:
PyTorch runs the meta device's operations in Python, where a loop is slow.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attend_shapes(
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: tuple[int, ...],
    num_points: int,
    base_size: float,
    ignore_HD: Tensor,
) -> Tensor:
    """The shape of `attend_reference`'s result, and its way to the inputs for gradients. Arguments as
    there.
    """
    B, Q, H, _ = query_term_BQHE.shape
    D = value_JSHD.shape[-1]
    samples = image_BN.shape[1] * len(level_sizes) * num_points
    map_BHD11 = value_JSHD.sum((0, 1)).expand(H, D).expand(B, H, D)[..., None, None]
    place_BHQ = (query_term_BQHE.sum(-1) + index_term_KHE.sum((0, 2))).transpose(1, 2)
    grid_BHQs2 = place_BHQ[..., None, None].expand(B, H, Q, samples, 2).to(value_JSHD.dtype)
    sampled_BHDQs = F.grid_sample(map_BHD11.flatten(0, 1), grid_BHQs2.flatten(0, 1), align_corners=False)
    seen_BHDQ = sampled_BHDQs.sum(-1).unflatten(0, (B, H))
    return seen_BHDQ.permute(0, 3, 1, 2) + ignore_HD
