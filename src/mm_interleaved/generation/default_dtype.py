"""torch's default dtype while libraries compute that make numbers without naming a dtype.

Samplers of diffusers do: in another default than single precision they end in an error (UniPC) or in other
pictures (LCM). Nothing of ours depends on the default.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _SinglePrecision:
    """The default dtype is torch's own for as long as anyone needs it, and what it was afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers, self._before = 0, torch.float32

    def enter(self) -> None:
        with self._lock:
            if self._callers == 0:
                self._before = torch.get_default_dtype()
                self._set(torch.float32)
            self._callers += 1

    def leave(self) -> None:
        with self._lock:
            self._callers -= 1
            if self._callers == 0:
                self._set(self._before)

    @staticmethod
    def _set(dtype: torch.dtype) -> None:
        # It is the whole process's: where it is single precision anyway, nothing is touched.
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)


_single_precision = _SinglePrecision()


@contextmanager
def single_precision() -> Iterator[None]:
    """Within, torch's default dtype is float32. Any number of threads may be inside at once."""
    _single_precision.enter()
    try:
        yield
    finally:
        _single_precision.leave()
