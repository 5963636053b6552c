"""How a stage computes: where, in which number format, by which attention, at which loss scale.

Which device that is, and in which number format it computes, is chosen in `mm_interleaved.devices`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FIRST_SCALE = 2.0**16
WINDOW = 250
"""Steps without overflow after which the scale doubles (the released training's value)."""


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies; batches go there as soon as they are made."""
    parameters: Iterator[nn.Parameter] = module.parameters()
    return next(parameters).device


def autocast(number_format: str, device: torch.device) -> torch.autocast:
    """Within, convolutions and matrix products run in a number format; weights stay as they are."""
    # Of float32 nothing has to be said, and autocast knows no such type.
    number_type = getattr(torch, number_format) if number_format != "float32" else torch.bfloat16
    return torch.autocast(device.type, dtype=number_type, enabled=number_format != "float32")


def fast_attention(device: torch.device) -> AbstractContextManager[object]:
    """Within, attention over short rows is computed in the way that is fastest to learn with.

    On a CPU the backward pass of the fused attention takes three times as long as plain matrix products, over
    a few hundred tokens in bfloat16 (0.37 s against 0.13 s a step, 2026-11). On a GPU PyTorch chooses.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class LossScale:
    """A factor of the loss in float16, which halves when a gradient overflows and doubles after a while
    without.

    Gradients are computed large enough not to vanish below float16's smallest number, and scaled back.

    Args:
        is_used: False leaves losses and gradients alone (float32 and bfloat16 need no scale).
    """

    def __init__(self, is_used: bool) -> None:
        self.is_used = is_used
        self.factor = FIRST_SCALE if is_used else 1.0
        self._good_steps = 0

    @torch.no_grad()
    def undo(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients by the factor."""
        if self.is_used:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.factor)  # pyright: ignore[reportPrivateUsage]

    def shrink(self) -> bool:
        """After an overflow: halves the factor. False if it cannot be halved: the numbers are at fault."""
        if not self.is_used or self.factor <= 1.0:
            return False
        self.factor, self._good_steps = self.factor / 2, 0
        return True

    def grow(self) -> None:
        """After a good step."""
        self._good_steps += 1
        if self.is_used and self._good_steps % WINDOW == 0:
            self.factor *= 2

    def record(self) -> dict[str, Any]:
        """Its state as JSON."""
        return {"factor": self.factor, "good_steps": self._good_steps}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Takes over a state."""
        self.factor, self._good_steps = float(record["factor"]), int(record["good_steps"])
