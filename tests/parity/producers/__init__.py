"""Our side of a golden folder: one function an output, found by the pattern of the output's key.

A function gets the folder and the pattern's groups. What several outputs are made from is a `shared` step;
so nothing is computed twice, and whatever fails takes nothing with it but what is made from it.
"""

import re
from collections.abc import Callable

import torch
from golden import Golden, StepFailedError
from torch import Tensor

from mm_interleaved.errors import NumericalError

from . import images, schedule, synchronizers, text, training, vision

PRODUCERS: dict[str, Callable[..., Tensor]] = {
    **vision.OUTPUTS,
    **training.OUTPUTS,
    **text.OUTPUTS,
    **images.OUTPUTS,
    **synchronizers.OUTPUTS,
    **schedule.OUTPUTS,
}


def produce(golden: Golden, key: str) -> Tensor:
    """Our tensor for an output key.

    Raises:
        LookupError: no producer makes it, or the folder lacks what it is made from.
    """
    for pattern, producer in PRODUCERS.items():
        if match := re.fullmatch(pattern, key):
            try:
                with torch.no_grad():
                    return producer(golden, *match.groups())
            except (NumericalError, StepFailedError) as error:  # a missing weight is not a number
                error.add_note(golden.what_is_missing)
                raise
    raise LookupError(f"nothing of ours produces {key}")
