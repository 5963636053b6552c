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
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mm_interleaved.errors import MMInterleavedError, NumericalError
from mm_interleaved.runs.ranks import ALONE, Ranks
from mm_interleaved.training.metrics import LogWriter, count_flops
from mm_interleaved.training.optimizer import ParameterRule
from mm_interleaved.training.parallel import whole
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Losses, MicroBatches, Observer, Stage, StreamStage
from mm_interleaved.training.stage_run import StageRun

logger = logging.getLogger(__name__)


class StoppedBySignal(MMInterleavedError):  # noqa: N818 - nothing went wrong
    """A signal asked the run to stop; it saved first and can be resumed."""

    exit_code = 75


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
    run = StageRun(stage, config, folder, settings or {}, rules, ranks, writers)
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


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything random in one step; ranks have their own (for dropout)."""
    # Primes above any usual number of steps, so that runs, their steps and their ranks do not share seeds.
    return (seed * 1_000_003 + step + rank * 1_000_000_007) % 2**63


def _update(stage: Stage, config: StageConfig, run: StageRun, batch: Any, wants_stop: bool) -> bool:
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


def _backward(stage: Stage, run: StageRun, batch: Any) -> list[Losses]:
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


def _refuse(stage: Stage, run: StageRun, losses: Sequence[Losses], norm: float, is_bad: bool) -> None:
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


def _observe(observer: Observer, run: StageRun) -> None:
    """Calls an observer; what it fails at is no reason to end the run."""
    with run.averaged_weights(), run.number_type():
        try:
            observer(run.step)
        except Exception as error:
            name = type(observer).__name__
            logger.warning("%s failed after step %d (%s: %s)", name, run.step, type(error).__name__, error)


def _measure_flops(stage: Stage, run: StageRun, batch: Any) -> None:
    """Counts what one batch costs a token, so that the log can report the share of the device in use."""
    losses: list[Losses] = []
    flops = count_flops(lambda: losses.extend(_backward(stage, run, batch)))
    run.optimizer.zero_grad()
    tokens = sum(piece.counts.get("tokens", 0) for piece in losses)
    run.meter.flops_a_token = flops / tokens if tokens else 0.0


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
