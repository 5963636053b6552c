"""Weighted bilinear sampling as one `embedding_bag`: no sample is ever stored, forward or backward.

A cell of a head is a row of a table, a query's samples are a bag of (row, weight) pairs: four corners a
point.
Letters: B rows, Q queries, N images, M visible pairs of query and image, H heads, L levels, P points, S cells
of all levels, D channels per head, E terms a head, K rows of the relative-index table (see `attention.py`).
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
    first_cell_BQ11 = (torch.arange(B, device=value_BSHD.device) * S)[:, None, None, None].expand(B, Q, 1, 1)
    out = _bags(
        value_BSHD.reshape(B * S, H, D),
        level_sizes,
        first_cell_BQ11.reshape(B * Q, 1, 1, 1),
        location_BQHLP2.flatten(0, 1),
        weight_BQHLP.flatten(0, 1),
    )
    return out.view(B, Q, H, D)


def attend_gather(
    value_BNSHD: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: Sequence[int],
    *,
    num_points: int,
    base_size: float,
    ignore_HD: Tensor | None = None,
) -> Tensor:
    """`multi_image_deformable_attention` over the visible pairs alone: packed documents pay for their own
    images.

    Listing the pairs costs one synchronisation with the device.
    """
    B, N, S, H, D = value_BNSHD.shape
    Q, L, P = query_term_BQHE.shape[1], len(level_sizes), num_points

    # 1. The pairs, and what each of them says.
    row_M, query_M, image_M = relative_index_BQN.nonzero(as_tuple=True)
    flat_query_M = row_M * Q + query_M
    query_term_MHE = query_term_BQHE.reshape(B * Q, H, -1).index_select(0, flat_query_M)
    term_MHE = query_term_MHE + index_term_KHE.index_select(0, relative_index_BQN[row_M, query_M, image_M])
    offset_MH1P2 = term_MHE[..., : 2 * P].unflatten(-1, (1, P, 2))
    logit_MHj = term_MHE[..., 2 * P :]

    # 2. Softmax over all pairs of a query and the one logit of zero, which starts maximum and sum.
    with torch.no_grad():
        index_MH = flat_query_M[:, None].expand(-1, H)
        greatest_qH = logit_MHj.new_zeros(B * Q, H).scatter_reduce(0, index_MH, logit_MHj.amax(-1), "amax")
    exponential_MHj = (logit_MHj - greatest_qH[flat_query_M][..., None]).exp()
    zero_qH = (-greatest_qH).exp()
    sum_qH = zero_qH.index_add(0, flat_query_M, exponential_MHj.sum(-1))

    # 3. One bag a pair and head, added up over the images of a query.
    reference_q2 = reference_BQ2.expand(B, Q, 2).reshape(B * Q, 2)
    location_MH1P2 = reference_q2[flat_query_M][:, None, None, None] + offset_MH1P2 / base_size
    seen_MHD = _bags(
        value_BNSHD.reshape(B * N * S, H, D),
        level_sizes,
        ((row_M * N + image_M) * S)[:, None, None, None],
        location_MH1P2,
        exponential_MHj.unflatten(-1, (L, P)),
    )
    out_qHD = seen_MHD.new_zeros(B * Q, H, D).index_add(0, flat_query_M, seen_MHD)
    if ignore_HD is not None:
        out_qHD = out_qHD + zero_qH[..., None].to(out_qHD.dtype) * ignore_HD
    return (out_qHD / sum_qH[..., None].to(out_qHD.dtype)).view(B, Q, H, D)


def _bags(
    table_cHD: Tensor,
    level_sizes: Sequence[int],
    first_cell_M111: Tensor,
    location_MHLP2: Tensor,
    weight_MHLP: Tensor,
) -> Tensor:
    """Weighted sums of bilinear samples, one a bag and head: (M, H, D).

    Args:
        table_cHD: all cells there are.
        first_cell_M111: where in the table the pyramid of each bag begins.
        location_MHLP2: (x, y) in [0, 1]; the level axis may have length one, shared by all levels.
        weight_MHLP: weight of each sample.
    """
    M, H, L, P = weight_MHLP.shape
    bag_size = 4 * L * P
    device = table_cHD.device
    size_L1 = torch.tensor(level_sizes, device=device)[:, None]
    side_L1 = size_L1.to(location_MHLP2.dtype)
    start_L1 = size_L1.square().cumsum(0) - size_L1.square()

    # 1. The four corners of each point, in cells of its level; corners outside the map weigh nothing.
    x = location_MHLP2[..., 0] * side_L1 - 0.5
    y = location_MHLP2[..., 1] * side_L1 - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    right_share, bottom_share = x - left, y - top
    cells, weights = [], []
    for dy, share_y in ((0, 1 - bottom_share), (1, bottom_share)):
        row, has_row = _clamp(top + dy, side_L1)
        weight_y = weight_MHLP * share_y * has_row
        for dx, share_x in ((0, 1 - right_share), (1, right_share)):
            column, has_column = _clamp(left + dx, side_L1)
            cells.append(row * size_L1 + column)
            weights.append(weight_y * share_x * has_column)

    # 2. Row of the table = (cell, head), the memory order of the values.
    cell_MHLPc = torch.stack(cells, dim=-1) + (start_L1 + first_cell_M111)[..., None]
    table_row = cell_MHLPc * H + torch.arange(H, device=device)[:, None, None, None]
    out = F.embedding_bag(
        table_row.view(M * H, bag_size),
        table_cHD.reshape(-1, table_cHD.shape[-1]),
        mode="sum",
        per_sample_weights=torch.stack(weights, dim=-1).view(M * H, bag_size).to(table_cHD.dtype),
    )
    return out.view(M, H, table_cHD.shape[-1])


def _clamp(index: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """A row or column as int64, moved onto the map, and 1 where it was there already, else 0.

    Clamped before the cast: a far-off offset must not overflow an integer.
    """
    inside = torch.minimum(index.clamp(min=0), side - 1)
    return inside.long(), (inside == index).to(index.dtype)
