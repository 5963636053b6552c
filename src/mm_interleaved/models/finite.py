"""The one guard between what a model computes and whoever gets it: words, scores, latents, pixels."""

from torch import Tensor

from mm_interleaved.errors import NumericalError


def check_finite(numbers: Tensor, what: str) -> Tensor:
    """The numbers, if they are numbers. Raises NumericalError naming `what`, a plural noun."""
    if not numbers.isfinite().all():
        raise NumericalError(f"{what} are not finite, expected numbers")
    return numbers
