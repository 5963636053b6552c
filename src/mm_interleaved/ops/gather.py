"""Weighted bilinear sampling as one `embedding_bag`: no sample is ever stored, forward or backward.

A cell of a head is a row of a table, a query's samples are a bag of (row, weight) pairs: four corners a point.
Letters: B rows, Q queries, H heads, L levels, P points, S cells of all levels, D channels per head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_gather(
    value_BSHD: Tensor, level_sizes: Sequence[int], location_BQHLP2: Tensor, weight_BQHLP: Tensor
) -> Tensor:
    """Sum of bilinear samples through `F.embedding_bag`. Arguments and result as `deformable_sampling`."""
    B, S, H, D = value_BSHD.shape
    Q = location_BQHLP2.shape[1]
    device = value_BSHD.device
    sizes = torch.tensor(level_sizes, device=device)
    size_L1 = sizes.to(location_BQHLP2.dtype)[:, None]
    start_L1 = (sizes.square().cumsum(0) - sizes.square())[:, None]

    # 1. The four corners of each point, in cells of its level; corners outside the map weigh nothing.
    x = location_BQHLP2[..., 0] * size_L1 - 0.5
    y = location_BQHLP2[..., 1] * size_L1 - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    corner_weights, corner_cells = [], []
    last_L1 = size_L1 - 1
    for dy, share_y in ((0, 1 - bottom_share), (1, bottom_share)):
        for dx, share_x in ((0, 1 - right_share), (1, right_share)):
            column, row = left + dx, top + dy
            inside = (column >= 0) & (column <= last_L1) & (row >= 0) & (row <= last_L1)
            # Clamp as floats, before the cast: a far-off offset must not overflow an integer.
            column = torch.minimum(column.clamp(min=0), last_L1).long()
            row = torch.minimum(row.clamp(min=0), last_L1).long()
            corner_cells.append(start_L1 + row * sizes[:, None] + column)
            corner_weights.append(torch.where(inside, weight_BQHLP * share_x * share_y, 0))
    weight_BQHLPc = torch.stack(corner_weights, dim=-1)
    cell_BQHLPc = torch.stack(corner_cells, dim=-1)

    # 2. Row of the table = (row of the batch, cell, head), the memory order of the values.
    head_H111 = torch.arange(H, device=device).view(H, 1, 1, 1)
    row_B11111 = torch.arange(B, device=device).view(B, 1, 1, 1, 1, 1)
    table_row = (row_B11111 * S + cell_BQHLPc) * H + head_H111
    out = F.embedding_bag(
        table_row.reshape(B * Q * H, -1),
        value_BSHD.reshape(B * S * H, D),
        mode="sum",
        per_sample_weights=weight_BQHLPc.reshape(B * Q * H, -1).to(value_BSHD.dtype),
    )
    return out.view(B, Q, H, D)
