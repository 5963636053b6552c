"""Parts of a model compiled where they stand: names of weights stay."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mm_interleaved.errors import UsageError


def compile_each(blocks: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile blocks one by one, in place; the first call of each kind pays for it.

    Blocks instead of the whole: a kind of block is compiled in seconds and serves all of its kind, and what
    stands between them (which images are visible) need not be compiled.

    Args:
        backend: a name that torch knows, or one of one's own.

    Raises:
        UsageError: torch knows no such name.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise UsageError(f"compile_backend: expected one of {', '.join(known)}, found {backend!r}")
    for block in blocks:
        block.compile(backend=backend)
