"""A model in evaluation mode for as long as something is generated, and as it was afterwards.

In training mode the layers of transformers drop activations at random and, with gradient checkpointing, leave
the cache empty: what is generated would not be what the model says.
"""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

from torch import nn

from mm_interleaved.models.shared_change import SharedChange, Undo


def _evaluate(model: nn.Module) -> Undo | None:
    # Not all modules are asked: that would take longer than a token does.
    if not any(module.training for module in (model, *model.children())):
        return None
    in_training = [module for module in model.modules() if module.training]
    model.eval()

    def undo() -> None:
        for module in in_training:
            module.training = True

    return undo


_evaluation = SharedChange(_evaluate)


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """The model in evaluation mode; each of its modules gets its own mode back when the last caller is done.

    Any number of threads may be inside at once. A model counts as training if it or one of its parts does.
    """
    return _evaluation.of(model)


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
