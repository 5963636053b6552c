"""Multi-image, multi-scale deformable attention: the one signature of all implementations, and their choice.

The definition is the paper's (arXiv 2401.10208, section 3.2) as the released code computes it. A query looks
into N images; an image has L square levels whose cells are flattened and concatenated, largest level first.
Offsets are shared by all levels and measured in cells of a map of `base_size`, so a point is the same place
on every level.
Letters: B rows, Q queries, N images, J images that there are values of, H heads, L levels, P points, S cells
an image, D channels a head, E = 2 P + L P terms a head (first P (x, y) offsets, then L x P logits), K rows of
the relative-index table.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mm_interleaved.ops.cpu_op import attend_gather, sample_gather
from mm_interleaved.ops.meta_op import attend_shapes
from mm_interleaved.ops.reference import attend_reference, sample_reference

HAS_TRITON = find_spec("triton") is not None


def _attend_triton(*arguments: Any) -> Tensor:
    # Not every machine has Triton, and only this implementation needs it.
    from mm_interleaved.ops.triton_op import attend_triton

    return attend_triton(*arguments)


FEW_CHANNELS = 16
"""Up to so many a head, grid_sample trains faster on a CPU: it costs by channels, embedding bags by samples.
Forward and backward of 48 pyramids, 336 queries, 4 heads of 12 channels, one level: 27 ms against 54; of 256
queries, 16 heads of 32 channels, three levels: 28 ms against 14 (one core, 2026-11)."""

# Of `multi_image_deformable_attention`: all take its arguments by place, the optional ones filled in.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": attend_reference,
    "gather": attend_gather,
    "triton": _attend_triton,
}


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
    image_BN: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Each query's weighted sum of samples from all images that it may look at.

    Hidden and padded images change nothing, to the bit. A query that sees no image gets `ignore_HD`, or
    zeros.

    Args:
        value_BNSHD: projected features of each image; with `image_BN`, of any images under any leading axes,
            counted row-major. An H of 1 is shared by all heads.
        query_term_BQHE, index_term_KHE, relative_index_BQN, reference_BQ2, base_size: see `sampling_plan`.
        level_sizes: width and height of each level of an image; their squares sum to S.
        ignore_HD: what "look nowhere" contributes.
        image_BN: int64, which of the values' images stands where; an image may stand in many places, and any
            may stand where it is hidden. So rows share images without a copy.
        implementation: "reference", "gather", "triton" or "auto" (the fastest for the device).

    Returns:
        (B, Q, H, D).

    Raises:
        ValueError: the cells do not fit the levels, or the implementation is unknown.
    """
    attend = IMPLEMENTATIONS[choose_implementation(implementation, value_BNSHD)]
    # Plain tensors on the meta device hold no numbers; subclasses that report it may.
    if value_BNSHD.device.type == "meta" and type(value_BNSHD) is Tensor:
        attend = attend_shapes
    B, Q, H, _ = query_term_BQHE.shape
    S, _, D = value_BNSHD.shape[-3:]
    N = relative_index_BQN.shape[2]
    if ignore_HD is None:
        ignore_HD = value_BNSHD.new_zeros(H, D)
    if N == 0:
        # All weight is on looking nowhere.
        return ignore_HD.to(value_BNSHD.dtype).expand(B, Q, H, D)
    _check_cells(level_sizes, S)
    value_JSHD = value_BNSHD.flatten(0, -4)
    if image_BN is None:
        image_BN = torch.arange(B * N, device=value_BNSHD.device).view(B, N)
    return attend(
        value_JSHD,
        image_BN,
        query_term_BQHE,
        index_term_KHE,
        relative_index_BQN,
        reference_BQ2,
        tuple(level_sizes),
        num_points,
        base_size,
        ignore_HD,
    )


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
        implementation: "reference", or any other name for the one path that is faster.

    Returns:
        (B, Q, H, D).

    Raises:
        ValueError: the cells do not fit the levels, or the implementation is unknown.
    """
    _check_cells(level_sizes, value_BSHD.shape[1])
    is_cpu_training = value_BSHD.device.type == "cpu" and value_BSHD.requires_grad and torch.is_grad_enabled()
    if implementation == "auto" and is_cpu_training and value_BSHD.shape[-1] <= FEW_CHANNELS:
        implementation = "reference"
    is_reference = choose_implementation(implementation, value_BSHD) == "reference"
    sample = sample_reference if is_reference else sample_gather
    return sample(value_BSHD, tuple(level_sizes), location_BQHLP2, weight_BQHLP)


def choose_implementation(implementation: str, value: Tensor) -> str:
    """Resolve "auto": on CUDA the fused kernel, if Triton is there and PyTorch is not asked for deterministic
    algorithms (its gradients are added up in no fixed order); elsewhere the gather path, but for devices
    without `embedding_bag` and for the one without numbers.

    Raises:
        ValueError: the name is unknown, or Triton is wanted and not installed.
    """
    if implementation == "auto":
        is_fixed_order = torch.are_deterministic_algorithms_enabled()
        if value.device.type == "cuda" and HAS_TRITON and not is_fixed_order:
            return "triton"
        # On the meta device the fast path would have to know how many pairs are visible.
        return "reference" if value.device.type in ("mps", "meta") else "gather"
    if implementation == "triton" and not HAS_TRITON:
        raise ValueError(
            "implementation 'triton' needs Triton, which is not installed; install mm-interleaved[kernels]"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {sorted(IMPLEMENTATIONS)} or 'auto', found {implementation!r}"
        )
    return implementation


def _check_cells(level_sizes: Sequence[int], found: int) -> None:
    cells = sum(size * size for size in level_sizes)
    if cells != found:
        raise ValueError(f"levels of sizes {tuple(level_sizes)} hold {cells} cells, found {found}")
