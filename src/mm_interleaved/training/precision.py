"""The loss scale of float16: gradients are computed large enough not to vanish, and scaled back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

FIRST_SCALE = 2.0**16
WINDOW = 250
"""Steps without overflow after which the scale doubles (the released training's value)."""


class LossScale:
    """A factor of the loss that halves when a gradient overflows and doubles after a while without.

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
            torch._foreach_mul_(gradients, 1 / self.factor)

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
