"""Where a stage computes: the device of its model, to which batches go as soon as they are made.

Which device that is, and in which number format it computes, is chosen in `mm_interleaved.devices`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies."""
    parameters: Iterator[nn.Parameter] = module.parameters()
    return next(parameters).device


def autocast(number_format: str, device: torch.device) -> torch.autocast:
    """Within, convolutions and matrix products run in a number format; weights stay as they are."""
    # Of float32 nothing has to be said, and autocast knows no such type.
    number_type = getattr(torch, number_format) if number_format != "float32" else torch.bfloat16
    return torch.autocast(device.type, dtype=number_type, enabled=number_format != "float32")


def fast_attention(device: torch.device) -> AbstractContextManager[object]:
    """Within, attention over short rows is computed in the way that is fastest to learn with.

    On a CPU the backward of the fused attention takes three times as long as plain matrix products at
    StoryWorld's lengths in bfloat16 (0.37 s against 0.13 s a step, 2026-11). On a GPU PyTorch chooses.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
