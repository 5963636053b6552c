"""The training loop: batch, loss, backward, clip, step, average, log, save, in this order.

A stage says what trains, makes a batch out of the step number, and computes named losses. Everything random
in a step is seeded by (seed, step), so there is no hidden state: a resumed run equals an uninterrupted one to
the bit (at the same number of threads).
"""

import json
import logging
import math
import signal
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm_interleaved.checkpoint.store import Checkpoint, load_newest_checkpoint, save_checkpoint
from mm_interleaved.errors import MMInterleavedError, NumericalError, StorageError
from mm_interleaved.training.optimizer import (
    AveragedWeights,
    build_optimizer,
    learning_rate,
)
from mm_interleaved.training.settings import StageConfig

logger = logging.getLogger(__name__)


class StoppedBySignal(MMInterleavedError):  # noqa: N818 - nothing went wrong
    """A signal asked the run to stop; it saved first and can be resumed."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class Losses:
    """What a stage computed on one batch."""

    total: Tensor
    """Scalar to be minimised."""
    named: Mapping[str, Tensor]
    """Scalars for the log."""
    counts: Mapping[str, int]
    """What went in, e.g. images and tokens; for the rates in the log."""
    document_ids: tuple[str, ...] = field(default=())
    """Which documents they came from; named if the loss is not finite."""


class Stage(Protocol):
    """One stage of a recipe."""

    name: str

    def trained_parts(self) -> Mapping[str, nn.Module]:
        """The modules whose parameters this stage changes, by name."""
        ...

    def make_batch(self, step: int) -> Any:
        """The batch of a step, a pure function of the run's seed and the step."""
        ...

    def compute_losses(self, batch: Any) -> Losses:
        """Forward pass; random numbers come from torch's global generator, seeded by the loop."""
        ...


def train_stage(
    stage: Stage,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> None:
    """Trains a stage to its last step and leaves its (averaged, if so configured) weights in the modules.

    Args:
        folder: where checkpoints and `log.jsonl` go; training goes on from the newest checkpoint there.
        settings: the run's resolved settings, saved with each checkpoint.

    Raises:
        NumericalError: the loss or the gradient is not finite; weights on disk are those before.
        StoppedBySignal: SIGTERM or SIGINT came; a checkpoint has been saved.
        StorageError: a checkpoint could not be written or read.
    """
    run = _StageRun(stage, config, folder, settings or {})
    run.resume()
    with (
        _stop_signals() as stop,
        tqdm(total=config.steps, initial=run.step, desc=stage.name, disable=not show_progress) as progress,
    ):
        while run.step < config.steps:
            torch.manual_seed(step_seed(seed, run.step))
            batch = stage.make_batch(run.step)
            losses = _update(stage, config, run, batch)
            run.step += 1
            run.log(losses, progress)
            if stop:
                run.save()
                raise StoppedBySignal(
                    f"stopped by {stop[0]} after step {run.step} of stage {stage.name}; resume to go on"
                )
            if run.step % config.save_every == 0 or run.step == config.steps:
                run.save()
    run.hand_on()


def trained_parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters of a stage's parts, by name; those that require no gradient stay as they are."""
    return {
        f"{part}.{name}": parameter
        for part, module in stage.trained_parts().items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in one step."""
    return (seed * 1_000_003 + step) % 2**63


def _update(stage: Stage, config: StageConfig, run: "_StageRun", batch: Any) -> Losses:
    """One optimizer step."""
    device_type = next(iter(run.parameters.values())).device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=config.use_bfloat16):
        losses = stage.compute_losses(batch)
    run.optimizer.zero_grad()
    losses.total.backward()
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm)
    if not (math.isfinite(losses.total.item()) and math.isfinite(norm.item())):
        raise NumericalError(
            f"stage {stage.name}, step {run.step}: loss {losses.total.item()}, gradient norm {norm.item()}, "
            f"expected finite numbers; documents {', '.join(losses.document_ids) or 'without ids'}"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, config)
    run.optimizer.step()
    if run.average is not None:
        run.average.update(run.parameters, run.step)
    return losses


class _StageRun:
    """The state of a stage while it trains: what a checkpoint saves and restores."""

    def __init__(self, stage: Stage, config: StageConfig, folder: Path, settings: Mapping[str, Any]) -> None:
        self.stage, self.config, self.folder, self.settings = stage, config, folder, settings
        self.step = 0
        self.parameters = trained_parameters(stage)
        self.optimizer = build_optimizer(self.parameters, stage.trained_parts(), config)
        self.average = AveragedWeights(self.parameters, config.ema_decay) if config.ema_decay else None
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._since = time.monotonic()

    def resume(self) -> None:
        checkpoint = load_newest_checkpoint(self.folder)
        if checkpoint is None:
            return
        self.step = checkpoint.step
        _copy(checkpoint.tensors["weights"], self.parameters)
        self.optimizer.load_tensors(checkpoint.tensors["optimizer"])
        if self.average is not None and "average" in checkpoint.tensors:
            _copy(checkpoint.tensors["average"], self.average.tensors)
        logger.info("stage %s goes on after step %d", self.stage.name, self.step)

    def save(self) -> None:
        tensors: dict[str, Mapping[str, Tensor]] = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.tensors(),
        }
        if self.average is not None:
            tensors["average"] = self.average.tensors
        state = {"stage": self.stage.name, "settings": dict(self.settings)}
        save_checkpoint(self.folder, Checkpoint(self.step, tensors, state))

    def hand_on(self) -> None:
        """Leaves the averaged weights in the modules."""
        if self.average is not None:
            _copy(self.average.tensors, self.parameters)

    def log(self, losses: Losses, progress: tqdm) -> None:
        """Adds to the running means; writes a line to the log file every `log_every` steps."""
        for name, value in losses.named.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        for name, count in losses.counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        progress.update()
        if self.step % self.config.log_every:
            return
        seconds = max(1e-9, time.monotonic() - self._since)
        means = {name: round(value / self.config.log_every, 6) for name, value in self._sums.items()}
        rates = {f"{name}/s": round(count / seconds, 1) for name, count in self._counts.items()}
        line = {
            "stage": self.stage.name,
            "step": self.step,
            **means,
            **rates,
            "lr": learning_rate(self.step, self.config),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)
        progress.set_postfix(means | rates)
        self._sums, self._counts, self._since = {}, {}, time.monotonic()


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    assert source.keys() == destination.keys(), (
        f"tensors differ: {sorted(source.keys() ^ destination.keys())[:4]}"
    )
    for name, tensor in source.items():
        destination[name].copy_(tensor)


def load_stage_weights(stage: Stage, folder: Path) -> int:
    """Puts the newest checkpoint's weights (the averaged ones, where kept) into a stage's modules; returns
    its step.

    Raises:
        StorageError: there is no whole checkpoint.
    """
    checkpoint = load_newest_checkpoint(folder)
    if checkpoint is None:
        raise StorageError(f"{folder}: expected a checkpoint, found none")
    weights = checkpoint.tensors.get("average", checkpoint.tensors["weights"])
    _copy(weights, trained_parameters(stage))
    return checkpoint.step


@contextmanager
def _stop_signals():
    """A list that receives the name of a stop signal as it arrives; earlier handlers come back at the end."""
    received: list[str] = []
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            previous[number] = signal.signal(
                number, lambda number, _: received.append(signal.Signals(number).name)
            )
        except ValueError:  # not the main thread: the caller's handlers stay in charge
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
