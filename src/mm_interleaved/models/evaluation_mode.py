"""A model in evaluation mode for as long as something is generated, and as it was afterwards.

In training mode the layers of transformers drop activations at random and, with gradient checkpointing, leave
the cache empty: what is generated would not be what the model says.
"""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


class _Modes:
    """How many callers need a model in evaluation mode, and which of its modules were in training mode."""

    def __init__(self, model: nn.Module):
        self.callers = 0
        self.training = [module for module in model.modules() if module.training]


_lock = threading.Lock()
_in_use: "WeakKeyDictionary[nn.Module, _Modes]" = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules gets its own mode back when the last caller is done.

    Any number of threads may be inside at once. A model counts as training if it or one of its parts does.
    """
    modes = _enter(model)
    try:
        yield
    finally:
        if modes is not None:
            _leave(model, modes)


def _enter(model: nn.Module) -> _Modes | None:
    with _lock:
        modes = _in_use.get(model)
        # Not all modules are asked: that would take longer than a word does.
        if modes is None and any(module.training for module in (model, *model.children())):
            modes = _in_use[model] = _Modes(model)
            model.eval()
        if modes is not None:
            modes.callers += 1
        return modes


def _leave(model: nn.Module, modes: _Modes) -> None:
    with _lock:
        modes.callers -= 1
        if modes.callers == 0:
            del _in_use[model]
            for module in modes.training:
                module.training = True


def steps_in_evaluation_mode(model: nn.Module, steps: Generator[Any, Any, Any]) -> Iterator[Any]:
    """Each step of a generator in evaluation mode; whoever takes the items finds the model as it was."""
    with closing(steps):
        while True:
            with evaluation_mode(model):
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
