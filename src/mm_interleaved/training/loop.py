"""The training loop: batch, loss, backward, clip, step, average, log, save, in this order.

A stage names what trains, makes a batch out of the step number, and computes named losses. Everything random
in a step is seeded by (seed, step), so there is no hidden state: a resumed run equals an uninterrupted one to
the bit (at the same number of threads). A stage whose batches come out of a stream reports its place in it.
"""

import logging
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm_interleaved.errors import MMInterleavedError, NumericalError, StorageError, escape
from mm_interleaved.files import remove_temporary_files
from mm_interleaved.training.checkpoints import (
    CheckedFolder,
    Checkpoint,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    tidy,
)
from mm_interleaved.training.computation import LossScale, autocast
from mm_interleaved.training.metrics import LinesFile, Log, LogWriter, Meter, count_flops
from mm_interleaved.training.optimizer import (
    AveragedWeights,
    MuonWithAdamW,
    ParameterRule,
    learning_rate,
)
from mm_interleaved.training.parallel import ALONE, Ranks, whole
from mm_interleaved.training.parameter_groups import inner_matrices
from mm_interleaved.training.settings import LOG_NAME, StageConfig

logger = logging.getLogger(__name__)


class StoppedBySignal(MMInterleavedError):  # noqa: N818 - nothing went wrong
    """A signal asked the run to stop; it saved first and can be resumed."""

    exit_code = 75


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


def train_stage(
    stage: Stage,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    rules: Mapping[str, ParameterRule] = MappingProxyType({}),
    ranks: Ranks = ALONE,
    observers: Sequence[Observer] = (),
    writers: Sequence[LogWriter] = (),
    measure_flops: bool = False,
) -> None:
    """Trains a stage to its last step and leaves its (averaged, if so configured) weights in the modules.

    Args:
        folder: where checkpoints and `log.jsonl` go; training goes on from the newest checkpoint there.
        settings: the run's resolved settings, saved with each checkpoint.
        rules: learning rates and decays of parameters that have their own, by the names of
            `trained_parameters`.
        ranks: the processes that train together; all of them call this.
        observers: called every so many steps.
        writers: where lines of the log go besides `log.jsonl`.
        measure_flops: count the multiplications of the first batch, so that the log can report the share of
            the device that is used (MFU); costs one more pass.

    Raises:
        NumericalError: the loss or the gradient is not finite; weights on disk are those before.
        StoppedBySignal: SIGTERM or SIGINT came; a checkpoint has been saved.
        StorageError: a checkpoint could not be written or read.
        ModelFileError: there are checkpoints, and none of them is whole.
    """
    run = _StageRun(stage, config, folder, settings or {}, rules, ranks, writers)
    run.resume()
    # A bar is for a terminal; a file gets the lines of the log.
    has_progress = show_progress and ranks.is_first and sys.stderr.isatty()
    with (
        _stop_signals() as stop,
        tqdm(total=config.steps, initial=run.step, desc=stage.name, disable=not has_progress) as progress,
    ):
        try:
            while run.step < config.steps:
                torch.manual_seed(step_seed(seed, run.step, ranks.rank))
                batch = stage.make_batch(run.step)
                if measure_flops and not run.meter.flops_a_token:
                    _measure_flops(stage, run, batch)
                    # Counting took random numbers; the step has to find those that it would have found.
                    torch.manual_seed(step_seed(seed, run.step, ranks.rank))
                is_stopping = _update(stage, config, run, batch, bool(stop))
                is_stopping = is_stopping or (ranks.size == 1 and bool(stop))
                run.log(progress)
                if is_stopping or run.step % config.save_every == 0 or run.step == config.steps:
                    run.save()
                for observer in observers:
                    if observer.every and run.step % observer.every == 0:
                        _observe(observer, run)
                if is_stopping:
                    name = stop[0] if stop else "a signal to another rank"
                    raise StoppedBySignal(
                        f"stopped by {name} after step {run.step} of stage {stage.name}; resume to go on"
                    )
        finally:
            run.lines.close()
    run.hand_on()


def trained_parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters of a stage's parts, by name; those that require no gradient stay as they are."""
    return {
        f"{part}.{name}": parameter
        for part, module in stage.trained_parts().items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything random in one step; ranks have their own (for dropout)."""
    # Primes above any usual number of steps, so that runs, their steps and their ranks do not share seeds.
    return (seed * 1_000_003 + step + rank * 1_000_000_007) % 2**63


def _update(stage: Stage, config: StageConfig, run: "_StageRun", batch: Any, wants_stop: bool) -> bool:
    """One optimizer step. True if some rank wants to stop after it."""
    # 1. Gradients of all micro-batches.
    run.optimizer.zero_grad()
    losses = _backward(stage, run, batch)
    run.scale.undo(run.parameters.values())
    highest = config.max_grad_norm or math.inf
    norm = float(whole(nn.utils.clip_grad_norm_(run.parameters.values(), highest)))

    # 2. What the ranks have to agree on: the losses, whether they are numbers, whether to stop.
    is_bad = not all(math.isfinite(float(piece.total)) for piece in losses)
    names = sorted(losses[0].named)
    counted = sorted(losses[0].counts)
    sums = run.ranks.sum(
        [float(is_bad), float(wants_stop)]
        + [sum(float(piece.named[name]) for piece in losses) for name in names]
        + [float(sum(piece.counts[name] for piece in losses)) for name in counted]
    )
    if sums[0] or not math.isfinite(norm):
        # In float16 a gradient may overflow where the loss is finite: the step is left out.
        if sums[0] or not run.scale.shrink():
            _refuse(stage, run, losses, norm, is_bad)
        is_skipped = True
    else:
        is_skipped = False
        run.scale.grow()
        run.optimizer.set_learning_rates(run.step, config)
        run.optimizer.step()
        if run.average is not None:
            run.average.update(run.parameters, run.step)

    # 3. The log.
    means = dict(zip(names, sums[2:], strict=False)) | ({"skipped": 1.0} if is_skipped else {})
    run.meter.add(means, dict(zip(counted, sums[2 + len(names) :], strict=True)))
    run.norm = norm
    run.step += 1
    return bool(sums[1])


def _backward(stage: Stage, run: "_StageRun", batch: Any) -> list[Losses]:
    """Adds up the gradients of a batch's pieces; returns their losses without their graphs."""
    pieces = batch.pieces if isinstance(batch, MicroBatches) else (batch,)
    results = []
    for index, piece in enumerate(pieces):
        with _summing(stage, is_last=index == len(pieces) - 1):
            with run.number_type():
                losses = stage.compute_losses(piece)
            (losses.total if run.scale.factor == 1.0 else losses.total * run.scale.factor).backward()
        named = {name: value.detach() for name, value in losses.named.items()}
        results.append(Losses(losses.total.detach(), named, losses.counts, losses.document_ids))
    return results


def _summing(stage: Stage, *, is_last: bool) -> AbstractContextManager[None]:
    return stage.summing_gradients(is_last) if isinstance(stage, StreamStage) else nullcontext()


def _refuse(stage: Stage, run: "_StageRun", losses: Sequence[Losses], norm: float, is_bad: bool) -> None:
    """Stops all ranks, naming the documents of those whose loss is not finite (of all, if it is the norm)."""
    total = sum(float(piece.total) for piece in losses)
    pieces = [piece for piece in losses if not is_bad or not math.isfinite(float(piece.total))]
    mine = (total, [name for piece in pieces for name in piece.document_ids], is_bad)
    everyone = run.ranks.gather(mine)
    guilty = [found for found in everyone if found[2]] or everyone
    ids = [name for _, names, _ in guilty for name in names]
    raise NumericalError(
        f"stage {stage.name}, step {run.step}: loss {guilty[0][0]}, gradient norm {norm}, "
        f"expected finite numbers; documents {', '.join(ids) or 'without ids'}"
    )


def _observe(observer: Observer, run: "_StageRun") -> None:
    """Calls an observer; what it fails at is no reason to end the run."""
    with run.averaged_weights(), run.number_type():
        try:
            observer(run.step)
        except Exception as error:
            name = type(observer).__name__
            logger.warning("%s failed after step %d (%s: %s)", name, run.step, type(error).__name__, error)


def _measure_flops(stage: Stage, run: "_StageRun", batch: Any) -> None:
    """Counts what one batch costs a token, so that the log can report the share of the device in use."""
    losses: list[Losses] = []
    flops = count_flops(lambda: losses.extend(_backward(stage, run, batch)))
    run.optimizer.zero_grad()
    tokens = sum(piece.counts.get("tokens", 0) for piece in losses)
    run.meter.flops_a_token = flops / tokens if tokens else 0.0


class _StageRun:
    """The state of a stage while it trains: what a checkpoint saves and restores."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        folder: Path,
        settings: Mapping[str, Any],
        rules: Mapping[str, ParameterRule],
        ranks: Ranks,
        writers: Sequence[LogWriter],
    ) -> None:
        self.stage, self.config, self.folder, self.settings = stage, config, folder, settings
        self.ranks = ranks
        self.step = 0
        self.norm = 0.0
        self.parameters = trained_parameters(stage)
        self.device = next(iter(self.parameters.values())).device
        matrices = inner_matrices(stage.trained_parts()) if config.optimizer == "muon" else frozenset[str]()
        self.optimizer = MuonWithAdamW(self.parameters, matrices, config, rules)
        self.average = AveragedWeights(self.parameters, config.ema_decay) if config.ema_decay else None
        self.number_format = config.number_format(self.device).name
        self.scale = LossScale(self.number_format == "float16")
        self.meter = Meter(self.device, ranks.size)
        self._file = LinesFile(folder / LOG_NAME)
        self.lines = Log((self._file, *writers))

    def number_type(self) -> torch.autocast:
        """Within, convolutions and matrix products run in the stage's number format."""
        return autocast(self.number_format, self.device)

    def resume(self) -> None:
        checkpoint = newest_checkpoint(self.folder, self.ranks, accept=self._accept)
        if self.ranks.is_first:
            # What an interrupted save or rotation left, and lines of steps that will be done again.
            remove_leftovers(self.folder)
            remove_temporary_files(self.folder)
            newest = self._file.cut(0 if checkpoint is None else checkpoint.step)
            if checkpoint is None and newest:
                # Stopped before it saved; or copied in part, without its checkpoints.
                logger.warning(
                    "%s: %s has a line of step %d and no checkpoint is there; beginning at step 0",
                    self.folder,
                    LOG_NAME,
                    newest,
                )
        if checkpoint is None:
            return
        self.step = checkpoint.step
        checkpoint.read_into("weights", {name: p.detach() for name, p in self.parameters.items()})
        if "optimizer" in checkpoint.groups:
            self.optimizer.prepare_state(checkpoint.names("optimizer"))
            checkpoint.read_into("optimizer", self.optimizer.tensors())
        if self.average is not None and "average" in checkpoint.groups:
            checkpoint.read_into("average", self.average.tensors)
        elif self.average is not None:
            # It was not kept so far: it begins with the weights as they are now, not as they were at first.
            self.average = AveragedWeights(self.parameters, self.config.ema_decay)
        self._warn_of_differences(checkpoint.state)
        tidy(self.folder, self.step, self.config.keep_checkpoints, self.ranks)
        logger.info("stage %s goes on after step %d", self.stage.name, self.step)

    def _accept(self, checkpoint: CheckedFolder) -> None:
        """Takes over what a checkpoint says beside its tensors. Raises StorageError where that, though its
        hash is right, is not what a run of this stage writes.
        """
        state = checkpoint.state
        try:
            if "weights" not in checkpoint.groups:
                raise KeyError("weights")
            for name in ("threads", "ranks"):
                int(state.get(name, 1))
            if isinstance(self.stage, StreamStage):
                stream = state["stream"]
                if stream.get("step", checkpoint.step) != checkpoint.step:
                    raise ValueError(f"stream: found step {stream['step']}")
                self.stage.load_state(stream)
            if "loss_scale" in state:
                if not 0 < state["loss_scale"]["factor"] < math.inf:
                    raise ValueError(f"loss_scale: found {state['loss_scale']['factor']}")
                if self.scale.is_used:
                    self.scale.restore(state["loss_scale"])
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            found = f"{type(error).__name__}: {escape(str(error))}"
            raise StorageError(
                f"{checkpoint.folder}: not a checkpoint of the stage {self.stage.name} ({found})"
            ) from error

    def save(self) -> None:
        tensors: dict[str, Mapping[str, Tensor]] = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.tensors(),
        }
        if self.average is not None:
            tensors["average"] = self.average.tensors
        state: dict[str, Any] = {
            "stage": self.stage.name,
            "settings": dict(self.settings),
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "number_format": self.number_format,
        }
        if self.scale.is_used:
            state["loss_scale"] = self.scale.record()
        if isinstance(self.stage, StreamStage):
            state["stream"] = dict(self.stage.state())
        tensors = {group: named for group, named in tensors.items() if named}
        save_checkpoint(
            self.folder,
            Checkpoint(self.step, tensors, state),
            keep=self.config.keep_checkpoints,
            ranks=self.ranks,
        )

    def hand_on(self) -> None:
        """Leaves the averaged weights in the modules."""
        if self.average is not None:
            _copy(self.average.tensors, self.parameters)

    @contextmanager
    def averaged_weights(self):
        """Within, the modules hold the averaged weights."""
        if self.average is None:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        _copy(self.average.tensors, self.parameters)
        try:
            yield
        finally:
            _copy(kept, self.parameters)

    def log(self, progress: tqdm) -> None:
        """Writes a line to the log every `log_every` steps, and at the end."""
        progress.update()
        if self.step % self.config.log_every and self.step != self.config.steps:
            return
        numbers = self.meter.read()
        if not self.ranks.is_first:
            return
        line = {
            "stage": self.stage.name,
            "step": self.step,
            **numbers,
            "norm": round(self.norm, 4),
            "lr": learning_rate(self.step, self.config),
        }
        self.lines.write(line)
        logger.info("%s", line)
        progress.set_postfix(numbers)

    def _warn_of_differences(self, state: Mapping[str, Any]) -> None:
        for what, now in (
            ("threads", torch.get_num_threads()),
            ("ranks", self.ranks.size),
            ("number_format", self.number_format),
        ):
            before = state.get(what, now)
            if before != now:
                logger.warning(
                    "%s: was %s, is now %s: sums are rounded otherwise, so bits will differ",
                    what.replace("_", " "),
                    before,
                    now,
                )


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], destination: Mapping[str, Tensor]) -> None:
    assert source.keys() == destination.keys(), (
        f"tensors differ: {sorted(source.keys() ^ destination.keys())[:4]}"
    )
    for name, tensor in source.items():
        destination[name].copy_(tensor)


@contextmanager
def _stop_signals():
    """A list that receives the name of a stop signal as it arrives; earlier handlers come back at the end.

    A second Ctrl-C does not wait for the step at hand: it interrupts.
    """
    received: list[str] = []

    def receive(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and name in received:
            raise KeyboardInterrupt
        received.append(name)
        logger.warning("%s: saving after the step at hand; Ctrl-C (again) does not wait for it", name)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            previous[number] = signal.signal(number, receive)
        except ValueError:  # not the main thread: the caller's handlers stay in charge
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
