"""The synchronizer's arithmetic, free of weights: one signature for every implementation.

`reference.py` is the specification (plain PyTorch, `grid_sample`); `gather.py` is the fast path for any
device (`embedding_bag`). Both take the same arguments; `implementation=` forces one of them.
"""

from mm_interleaved.ops.attention import (
    IMPLEMENTATIONS,
    SamplingPlan,
    deformable_sampling,
    multi_image_deformable_attention,
    sampling_plan,
)

__all__ = [
    "IMPLEMENTATIONS",
    "SamplingPlan",
    "deformable_sampling",
    "multi_image_deformable_attention",
    "sampling_plan",
]
