"""The synchronizer's arithmetic, free of weights: one signature for every implementation.

`reference.py` is the specification (plain PyTorch, `grid_sample`); `cpu_op.py` is the fast path for any
device (`embedding_bag`, with a backward of its own), made of `visible_pairs.py` (which query sees which
image), `bilinear.py` (where) and `embedding_bag.py` (weighted sums of rows); `triton_op.py` launches the
fused kernels for GPUs of `triton_kernel.py`. `implementation=` forces one of them.
"""

from mm_interleaved.ops.attention import (
    IMPLEMENTATIONS,
    deformable_sampling,
    multi_image_deformable_attention,
)
from mm_interleaved.ops.reference import SamplingPlan, sampling_plan

__all__ = [
    "IMPLEMENTATIONS",
    "SamplingPlan",
    "deformable_sampling",
    "multi_image_deformable_attention",
    "sampling_plan",
]
