"""The state of a stage while it trains: weights, optimizer, averages, and how they are saved and resumed."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm_interleaved.errors import StorageError, escape
from mm_interleaved.files import remove_temporary_files
from mm_interleaved.runs.ranks import Ranks
from mm_interleaved.training.checkpoints import (
    CheckedFolder,
    Checkpoint,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    tidy,
)
from mm_interleaved.training.computation import LossScale, autocast
from mm_interleaved.training.metrics import LinesFile, Log, LogWriter, Meter
from mm_interleaved.training.optimizer import AveragedWeights, MuonWithAdamW, ParameterRule, learning_rate
from mm_interleaved.training.parameter_groups import inner_matrices
from mm_interleaved.training.settings import LOG_NAME, StageConfig
from mm_interleaved.training.stage import Stage, StreamStage, trained_parameters

logger = logging.getLogger(__name__)


class StageRun:
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

    def log(self, progress: "tqdm[Any]") -> None:
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
