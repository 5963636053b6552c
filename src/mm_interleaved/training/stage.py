"""What a stage of training is: which parts it trains, how it makes a batch, which losses it computes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Losses:
    """What a stage computed on one batch, or on one micro-batch: then its share of the step's losses."""

    total: Tensor
    """Scalar to be minimised."""
    named: Mapping[str, Tensor]
    """Scalars for the log."""
    counts: Mapping[str, int]
    """What went in, e.g. images and tokens; for the rates in the log."""
    document_ids: tuple[str, ...] = field(default=())
    """Which documents they came from; named if the loss is not finite."""


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """A batch in pieces that are computed one after another, their gradients added up."""

    pieces: tuple[Any, ...]


class Stage(Protocol):
    """One stage of a recipe."""

    name: str

    def trained_parts(self) -> Mapping[str, nn.Module]:
        """The modules whose parameters this stage changes, by name."""
        ...

    def make_batch(self, step: int) -> Any:
        """The batch of a step, a pure function of the run's seed and the step; or `MicroBatches`."""
        ...

    def compute_losses(self, batch: Any) -> Losses:
        """Forward pass; random numbers come from torch's global generator, seeded by the loop."""
        ...


@runtime_checkable
class StreamStage(Stage, Protocol):
    """A stage that reads a stream, on one or several ranks; a checkpoint holds its place in the stream."""

    def state(self) -> Mapping[str, Any]:
        """Where the stream is after the last batch, as JSON, the same on every rank; all ranks call it."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes there; called before the first batch is made."""
        ...

    def summing_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        """Within, forward and backward of a micro-batch; ranks exchange gradients only in the last."""
        ...


class Observer(Protocol):
    """Is called with the model while it trains, e.g. to generate samples."""

    every: int
    """Steps between two calls; 0 = never."""

    def __call__(self, step: int) -> None:
        """Called after so many steps, in the run's number type, with the averaged weights where there are
        any."""
        ...


def trained_parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters of a stage's parts, by name; those that require no gradient stay as they are."""
    return {
        f"{part}.{name}": parameter
        for part, module in stage.trained_parts().items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
