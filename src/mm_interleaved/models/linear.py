"""A linear layer that can be called without its bias."""

from torch import Tensor, nn
from torch.nn import functional as F


class OptionalBiasLinear(nn.Linear):
    """`nn.Linear` whose call can leave out the bias.

    Called, and not read by attribute: weights that accelerate offloads are only there during a call, and LoRA
    adds to what a call returns.
    """

    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        """(..., out channels) of (..., in channels)."""
        return F.linear(input, self.weight, self.bias if with_bias else None)
