"""The one guard between what a model computes and whoever gets it: words, scores, latents, pixels."""

from torch import Tensor, nn

from mm_interleaved.errors import NumericalError


def check_finite(numbers: Tensor, what: str) -> Tensor:
    """The numbers, if they are numbers. Raises NumericalError naming `what`, a plural noun."""
    if not numbers.isfinite().all():
        raise NumericalError(f"{what} are not finite, expected numbers")
    return numbers


def damaged_weight(model: nn.Module) -> str | None:
    """The name of the first weight that holds something other than finite numbers; None where there is none.

    Asked once, when a model is loaded: the numbers that such a weight makes are not always caught later,
    because the attention of PyTorch on a CPU turns queries that are NaN into zeros. Weights on the meta
    device are not seen.
    """
    for name, weight in model.named_parameters():
        is_read = weight.is_floating_point() and weight.device.type != "meta"
        if is_read and not weight.isfinite().all():
            return name
    return None
