"""torch's default dtype while libraries compute that make numbers without naming a dtype.

Samplers of diffusers do: in another default than single precision they end in an error (UniPC) or in other
images (LCM). Nothing of ours depends on the default.
"""

from contextlib import AbstractContextManager
from types import ModuleType

import torch

from mm_interleaved.models.shared_change import SharedChange, Undo


def _use_float32(_: ModuleType) -> Undo:
    before = torch.get_default_dtype()
    _set(torch.float32)
    return lambda: _set(before)


def _set(dtype: torch.dtype) -> None:
    # It is the whole process's: where it is single precision anyway, nothing is touched.
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)


_single_precision = SharedChange(_use_float32)


def single_precision() -> AbstractContextManager[None]:
    """Within, torch's default dtype is float32. Any number of threads may be inside at once."""
    return _single_precision.of(torch)
