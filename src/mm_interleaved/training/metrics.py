"""What a run reports while it trains: means, rates, memory, and how much of the device it uses.

Lines go to `log.jsonl`, and where they are wanted to TensorBoard and Weights & Biases.
"""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.files import is_regular_file, put_aside, storage_errors, write_file

logger = logging.getLogger(__name__)

# Dense bfloat16 products a second (of a V100, which has none, float16) by a word in the device's name, the
# first that is found in it; from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "V100": 125e12}


class LogWriter(Protocol):
    """Somewhere that lines of the log go."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Takes a line: `stage`, `step`, and numbers by name."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


class Meter:
    """Running means of losses and rates of what went in, between two lines of the log."""

    def __init__(self, device: torch.device, num_devices: int) -> None:
        self.device, self.num_devices = device, num_devices
        self.flops_a_token = 0.0
        self._peak = 0.0
        self._clear()

    def add(self, losses: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """One optimizer step's losses, and what went into it over all ranks."""
        self._steps += 1
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count

    def read(self) -> dict[str, float]:
        """Means and rates since the last reading."""
        seconds = max(1e-9, time.monotonic() - self._since)
        means = {name: round(value / max(1, self._steps), 6) for name, value in self._losses.items()}
        rates = {f"{name}/s": round(count / seconds, 1) for name, count in self._counts.items()}
        rates["memory_gb"] = round(peak_memory(self.device) / 1e9, 2)
        if self.flops_a_token and self._counts.get("tokens"):
            self._peak = self._peak or peak_flops(self.device)
            done = self.flops_a_token * self._counts["tokens"] / seconds
            rates["mfu"] = round(done / (self._peak * self.num_devices), 4)
        self._clear()
        return means | rates

    def _clear(self) -> None:
        self._losses: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._steps = 0
        self._since = time.monotonic()


class LinesFile:
    """A file of lines of JSON, each with the `step` it is about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> int:
        """Removes the lines of steps after `step` (they are done again), and a line that was torn. What is no
        file of lines is put aside.

        Returns:
            the newest step that it has a line of; 0 without any.
        """
        if not os.path.lexists(self.path):
            return 0
        if not is_regular_file(self.path):
            logger.warning("%s: is no regular file, now %s", self.path, put_aside(self.path).name)
            return 0
        lines = read_log(self.path)
        kept = [line for line in lines if line["step"] <= step]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return max((line["step"] for line in lines), default=0)

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error})") from error

    def close(self) -> None:
        pass


class Log:
    """Writers, of which one that fails is left out from then on, with a warning: a run is worth more than its
    curves. A disk that is full ends the run when the next checkpoint is written.
    """

    def __init__(self, writers: Sequence[LogWriter]) -> None:
        self._writers = list(writers)

    def write(self, line: Mapping[str, Any]) -> None:
        """Hands a line to all of them."""
        self._hand_on(lambda writer: writer.write(line))

    def close(self) -> None:
        """Closes them; used at the end of a stage, however it ends."""
        self._hand_on(lambda writer: writer.close())

    def _hand_on(self, action: Callable[[LogWriter], None]) -> None:
        for writer in tuple(self._writers):
            try:
                action(writer)
            except Exception as error:  # whatever a third party's writer raises
                name = type(writer).__name__
                logger.warning("%s failed and gets no more lines (%s: %s)", name, type(error).__name__, error)
                self._writers.remove(writer)


class TensorBoardWriter:
    """Curves for TensorBoard, in the folder of the stage."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "TensorBoard is not installed; install mm-interleaved[train], or set tensorboard=false"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Curves for Weights & Biases; its own settings (project, offline, key) are its own business."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"wandb is not installed ({error}); install it, or set wandb=false") from error
        self._run: Any = wandb.init(name=name, dir=str(folder), config=dict(settings), resume="allow")

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; those that were torn by a crash, or are no lines of a log, are left out."""
    with storage_errors(path, "read"):
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in map(_read_line, texts) if line is not None]
    if len(lines) < len(texts):
        logger.warning("%s: left out %d torn or damaged lines", path, len(texts) - len(lines))
    return lines


def _read_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def count_flops(work: Any) -> float:
    """Operations of a call without those of bilinear sampling, see `models.operations`."""
    # Loaded here: whoever reads a log does not wait for the libraries of models.
    from mm_interleaved.models.operations import count_operations

    return count_operations(work).products


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch on a GPU, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def peak_flops(device: torch.device) -> float:
    """Operations a second at best: as the maker says of a known device, else as a matrix product does."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for word, peak in _PEAKS.items() if word in name), None)
        if known is not None:
            return known
    # Large enough that its product takes longer than its call, small enough to be over in milliseconds.
    side = 768
    left = torch.ones(side, side, device=device, dtype=torch.float32)
    fastest = float("inf")
    for _ in range(3):
        started = time.monotonic()
        float((left @ left)[0, 0])
        fastest = min(fastest, time.monotonic() - started)
    return 2 * side**3 / fastest


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
