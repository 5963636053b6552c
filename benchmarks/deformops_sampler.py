"""The best public sampler as a baseline: deformops ("Efficient MSDA on GPUs", TMLR 2026).

It knows nothing of images: those stand as further levels, hidden ones with weight zero. Installed with
the extra `bench-gpu` on Python 3.12 or 3.13; nothing here imports it before it is called.
Letters as in `textbook.py`; E terms a head, K rows of the relative-index table.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NEARLY_NEVER = -10000.0
"""Logit of a hidden image's samples; minus infinity would make a query that sees nothing NaN."""


def has_deformops() -> bool:
    """Whether the package is installed."""
    return find_spec("deformops") is not None


def deformops_sampling(
    value_BSHd: Tensor, level_sizes: Sequence[int], location_BQHLP2: Tensor, weight_BQHLP: Tensor
) -> Tensor:
    """What the textbook's `grid_sampling` does: (B, Q, H, d)."""
    return _call("linear", value_BSHd, level_sizes, location_BQHLP2, weight_BQHLP)


def deformops_attention(
    value_BNSHd: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: Sequence[int],
    *,
    num_points: int,
    base_size: float,
) -> Tensor:
    """`multi_image_deformable_attention` with the softmax inside its kernel.

    Its softmax has no slot for attending to nothing; the share of that slot is put back by the sigmoid of the
    logits' log-sum-exp.
    """
    N, L = value_BNSHd.shape[1], len(level_sizes)
    term_BQHNE = (query_term_BQHE[:, :, None] + index_term_KHE[relative_index_BQN]).transpose(2, 3)
    hidden_BQ1N1 = (relative_index_BQN == 0)[:, :, None, :, None]
    logit_BQHNj = term_BQHNE[..., 2 * num_points :].masked_fill(hidden_BQ1N1, NEARLY_NEVER)
    seen = logit_BQHNj.flatten(3).logsumexp(-1).sigmoid()
    offset_BQHN1P2 = term_BQHNE[..., : 2 * num_points].unflatten(-1, (1, num_points, 2)) / base_size
    location_BQHNLP2 = (reference_BQ2[:, :, None, None, None, None] + offset_BQHN1P2).expand(
        *offset_BQHN1P2.shape[:4], L, num_points, 2
    )
    out = _call(
        "softmax", value_BNSHd.flatten(1, 2), tuple(level_sizes) * N,
        location_BQHNLP2.flatten(3, 4),        logit_BQHNj.unflatten(-1, (L, num_points)).flatten(3, 4),
    )  # fmt: skip
    return out * seen[..., None].to(out.dtype)


def _call(
    method: str, value_BSHd: Tensor, level_sizes: Sequence[int], location: Tensor, weight: Tensor
) -> Tensor:
    import deformops.registry as registry

    shapes = torch.tensor([[size, size] for size in level_sizes], device=value_BSHd.device)
    starts = (shapes.prod(1).cumsum(0) - shapes.prod(1)).contiguous()
    msda: Any = registry.msda
    out = msda(
        value_BSHd.contiguous(),
        shapes,
        starts,
        location.to(value_BSHd.dtype).contiguous(),
        weight.to(value_BSHd.dtype).flatten(3).contiguous(),
        method=registry.MSDAMethod(method),
    )
    return out.unflatten(-1, value_BSHd.shape[2:])
