"""Weighted bilinear sampling as the textbook writes it: the specification every fast path is tested against.

Letters: B rows, Q queries, H heads, L levels, P points, S cells of all levels, D channels per head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_reference(
    value_BSHD: Tensor, level_sizes: Sequence[int], location_BQHLP2: Tensor, weight_BQHLP: Tensor
) -> Tensor:
    """Sum of bilinear samples, one `grid_sample` a level. Arguments and result as `deformable_sampling`."""
    B, _, H, D = value_BSHD.shape
    Q, P = location_BQHLP2.shape[1], location_BQHLP2.shape[4]
    out_nDQ = value_BSHD.new_zeros(B * H, D, Q)
    start = 0
    for level, size in enumerate(level_sizes):
        cells_BCHD = value_BSHD[:, start : start + size * size]
        map_nDyx = cells_BCHD.permute(0, 2, 3, 1).reshape(B * H, D, size, size)
        # grid_sample wants [-1, 1]; with align_corners=False the centre of cell i lies at (i + 0.5) / size.
        grid_nQP2 = (2 * location_BQHLP2[:, :, :, level] - 1).permute(0, 2, 1, 3, 4).reshape(B * H, Q, P, 2)
        sample_nDQP = F.grid_sample(
            map_nDyx, grid_nQP2.to(map_nDyx.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight_n1QP = weight_BQHLP[:, :, :, level].permute(0, 2, 1, 3).reshape(B * H, 1, Q, P)
        out_nDQ = out_nDQ + (sample_nDQP * weight_n1QP.to(sample_nDQP.dtype)).sum(-1)
        start += size * size
    return torch.einsum("bhdq->bqhd", out_nDQ.view(B, H, D, Q))
