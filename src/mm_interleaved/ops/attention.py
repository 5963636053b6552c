"""Multi-image, multi-scale deformable attention: who is sampled where, with which weight.

The definition is the paper's (arXiv 2401.10208, section 3.2) as the released code computes it. A query looks
into N images; an image has L square levels whose cells are flattened and concatenated, largest level first.
Offsets are shared by all levels and measured in cells of a map of `base_size`, so a point is the same place
on every level.
Letters: B rows, Q queries, N images, H heads, L levels, P points, S cells an image, D channels a head,
E = 2 P + L P terms a head (first P (x, y) offsets, then L x P logits), K rows of the relative-index table.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.ops.gather import attend_gather, sample_gather
from mm_interleaved.ops.reference import sample_reference

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": sample_reference, "gather": sample_gather}


class SamplingPlan(NamedTuple):
    """Where each query samples and how much each sample weighs.

    `location`: (B, Q, H, N * L, P, 2), (x, y) with (0, 0) the upper left and (1, 1) the lower right corner of
    an image; image-major order. `weight`: (B, Q, H, N * L, P), in [0, 1]; with `ignore` it sums to one over
    the last two axes, and is exactly 0 for hidden images. `ignore`: (B, Q, H), the weight of looking nowhere.
    """

    location: Tensor
    weight: Tensor
    ignore: Tensor


def deformable_sampling(
    value_BSHD: Tensor,
    level_sizes: Sequence[int],
    location_BQHLP2: Tensor,
    weight_BQHLP: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples from the levels of one feature pyramid (Deformable DETR, section 4.1).

    Args:
        value_BSHD: cells of all levels, level after level, each in row-major order.
        level_sizes: width and height of each square level; their squares sum to S.
        location_BQHLP2: (x, y) in [0, 1] from the upper left corner; outside samples are zero.
        weight_BQHLP: weight of each sample, any value.
        implementation: "reference", "gather" or "auto" (the fastest for the device).

    Returns:
        (B, Q, H, D).

    Raises:
        ValueError: the cells do not fit the levels, or the implementation is unknown.
    """
    cells = sum(size * size for size in level_sizes)
    if cells != value_BSHD.shape[1]:
        raise ValueError(
            f"levels of sizes {tuple(level_sizes)} hold {cells} cells, got {value_BSHD.shape[1]}"
        )
    sample = IMPLEMENTATIONS[choose_implementation(implementation, value_BSHD)]
    return sample(value_BSHD, level_sizes, location_BQHLP2, weight_BQHLP)


def choose_implementation(implementation: str, value: Tensor) -> str:
    """Resolve "auto": the gather path, but for training on a CPU and for devices without `embedding_bag`.

    Training on a CPU, grid_sample's backward is faster than embedding_bag's, which sorts (1.1 s against 1.7 s
    a step of 16 documents of the shipped model, one core, 2026-11).

    Raises:
        ValueError: the name is unknown.
    """
    if implementation == "auto":
        is_cpu_training = value.device.type == "cpu" and value.requires_grad and torch.is_grad_enabled()
        return "reference" if value.device.type == "mps" or is_cpu_training else "gather"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {sorted(IMPLEMENTATIONS)} or 'auto', got {implementation!r}"
        )
    return implementation


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
    n]]`: the projections are linear, so what depends on the image is a table (reference/performance.md, E2).
    Next to all samples stands one extra logit of zero, "look nowhere" (E1: the released code spreads it over
    N * L slots of logit -log(N L), whose total mass is the same exp(0)).

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


def multi_image_deformable_attention(
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
    implementation: str = "auto",
) -> Tensor:
    """Each query's weighted sum of samples from all images that it may look at.

    Hidden and padded images change nothing, to the bit. A query that sees no image gets `ignore_HD`, or
    zeros.

    Args:
        value_BNSHD: projected features of each image.
        query_term_BQHE, index_term_KHE, relative_index_BQN, reference_BQ2, base_size: see `sampling_plan`.
        level_sizes: width and height of each level of an image.
        ignore_HD: what "look nowhere" contributes.
        implementation: see `deformable_sampling`.

    Returns:
        (B, Q, H, D).
    """
    B, N, S, H, D = value_BNSHD.shape
    Q = query_term_BQHE.shape[1]
    if N == 0:
        # All weight is on looking nowhere.
        nothing_BQHD = value_BNSHD.new_zeros(B, Q, H, D)
        return nothing_BQHD if ignore_HD is None else nothing_BQHD + ignore_HD
    if choose_implementation(implementation, value_BNSHD) == "gather":
        return attend_gather(
            value_BNSHD,
            query_term_BQHE,
            index_term_KHE,
            relative_index_BQN,
            reference_BQ2,
            level_sizes,
            num_points=num_points,
            base_size=base_size,
            ignore_HD=ignore_HD,
        )
    plan = sampling_plan(
        query_term_BQHE,
        index_term_KHE,
        relative_index_BQN,
        reference_BQ2,
        num_levels=len(level_sizes),
        num_points=num_points,
        base_size=base_size,
    )
    out = deformable_sampling(
        value_BNSHD.reshape(B, N * S, H, D),
        tuple(level_sizes) * N,
        plan.location,
        plan.weight,
        implementation=implementation,
    )
    if ignore_HD is None:
        return out
    return out + plan.ignore[..., None].to(out.dtype) * ignore_HD
