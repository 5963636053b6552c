"""Multi-image deformable attention as the textbook writes it: the specification every fast path is tested
against.

Plain PyTorch, every place and weight a tensor that can be looked at; letters as in `attention.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SamplingPlan(NamedTuple):
    """Where each query samples and how much each sample weighs.

    `location`: (B, Q, H, N * L, P, 2), (x, y) with (0, 0) the upper left and (1, 1) the lower right corner of
    an image; image-major order. `weight`: (B, Q, H, N * L, P), in [0, 1]; with `ignore` it sums to one over
    the last two axes, and is exactly 0 for hidden images. `ignore`: (B, Q, H), the weight of looking nowhere.
    """

    location: Tensor
    weight: Tensor
    ignore: Tensor


def sampling_plan(
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    *,
    num_levels: int,
    num_points: int,
    base_size: float,
) -> SamplingPlan:
    """Places and weights of all samples of all queries.

    The offsets and logits of query q looking at image n are `query_term[q] + index_term[relative_index[q,
    n]]`: the projections are linear, so what depends on the image is a table of one row a relative
    index. Next to all samples stands one extra logit of zero, "look nowhere": the released code spreads it
    over N * L slots of logit -log(N L), whose total mass is the same, N L exp(-log(N L)) = exp(0).

    Args:
        query_term_BQHE: what the query alone contributes.
        index_term_KHE: what each relative image index contributes.
        relative_index_BQN: 1 for the newest visible image, 2 for the one before; 0 if the image is hidden.
        reference_BQ2: (x, y) in [0, 1] from which a query's offsets count; broadcastable over B and Q.
        base_size: cells of the map in which offsets are measured.
    """
    B, Q, H, _ = query_term_BQHE.shape
    N, L, P = relative_index_BQN.shape[2], num_levels, num_points
    term_BQHNE = (query_term_BQHE[:, :, None] + index_term_KHE[relative_index_BQN]).transpose(2, 3)
    offset_BQHNP2 = term_BQHNE[..., : 2 * P].unflatten(-1, (P, 2))
    logit_BQHNLP = term_BQHNE[..., 2 * P :].unflatten(-1, (L, P))

    location_BQHN1P2 = (reference_BQ2[:, :, None, None, None] + offset_BQHNP2 / base_size).unsqueeze(4)
    location_BQHNLP2 = location_BQHN1P2.expand(B, Q, H, N, L, P, 2)

    hidden_BQ1N11 = (relative_index_BQN == 0)[:, :, None, :, None, None]
    logit_BQHj = logit_BQHNLP.masked_fill(hidden_BQ1N11, float("-inf")).flatten(3)
    with_zero = torch.cat([logit_BQHj, logit_BQHj.new_zeros(B, Q, H, 1)], dim=-1)
    weight_BQHj = with_zero.softmax(-1)
    return SamplingPlan(
        location=location_BQHNLP2.reshape(B, Q, H, N * L, P, 2),
        weight=weight_BQHj[..., :-1].reshape(B, Q, H, N * L, P),
        ignore=weight_BQHj[..., -1],
    )


def attend_reference(
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
    ignore_HD: Tensor,
) -> Tensor:
    """`multi_image_deformable_attention`, its optional arguments filled in."""
    H = query_term_BQHE.shape[2]
    value_BNSHD = value_JSHD[image_BN].expand(-1, -1, -1, H, -1)
    plan = sampling_plan(
        query_term_BQHE,
        index_term_KHE,
        relative_index_BQN,
        reference_BQ2,
        num_levels=len(level_sizes),
        num_points=num_points,
        base_size=base_size,
    )
    out_BQHD = sample_reference(
        value_BNSHD.flatten(1, 2), tuple(level_sizes) * image_BN.shape[1], plan.location, plan.weight
    )
    return out_BQHD + plan.ignore[..., None].to(out_BQHD.dtype) * ignore_HD


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
