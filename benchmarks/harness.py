"""One run, several sides, taken in turns: outputs compared first, then time, then memory.

sides -> compare -> Comparison -> Case -> one line of a table, one entry of the result
"""

import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Largest difference that counts as equal, as a share of the largest value.

In half precision the textbook itself is off by some hundredths, and by more in its gradients: there only
blunders show, and `exact_first` compares in single precision.
"""
COMPILED = "compiled"
"""How the names of compiled sides end."""
HALF = (torch.bfloat16, torch.float16)
FEWEST_TURNS, MOST_TURNS = 3, 50
CACHE_BYTES = 256 * 2**20
"""More than any second-level cache holds; overwritten before each timed turn on a GPU."""

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a part is run."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    least: int
    """Turns that each side should get."""
    seconds: float
    """After which no side gets a turn more than that."""
    patience: float
    """Seconds after which the fewest turns must do."""
    turn: float = 0.02
    """Seconds that a turn lasts at least; quick sides run several times in theirs."""
    deadline: float = math.inf
    """Of the part, by `time.perf_counter`: past it, the fewest turns must do."""
    compiles: bool = False
    """Whether sides that are compiled stand beside the others."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def has(self, seconds: float) -> bool:
        """Whether the part has so much time left."""
        return time.perf_counter() + seconds <= self.deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What became of all sides; the first one is what the others are compared with."""

    error: dict[str, float]
    """Largest difference from the first side, as a share of its largest value."""
    equal: bool
    median: dict[str, float] = field(default_factory=dict)
    """Seconds; nothing where the outputs differ."""
    least: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    wanted: int = 0
    """Runs that there should have been; there are fewer where time was short."""
    first: dict[str, float] = field(default_factory=dict)
    """Seconds of the first call of each side; that of a compiled one compiles."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Most that a run held in tensors beside its inputs and weights."""

    def ratio(self, side: str, reference: str | None = None) -> float | None:
        """How many times faster than the first side (or another)."""
        if not self.median:
            return None
        return self.median[reference or next(iter(self.median))] / self.median[side]

    def record(self, side: str) -> dict[str, Any]:
        """What a result says of it; `ratio` is that of one side."""
        first = next(iter(self.error))
        if not self.equal:
            return {"ratio": None, "equal": False, "error": self.error}
        compiling = {name: seconds for name, seconds in self.first.items() if name.endswith(COMPILED)}
        return {
            "ratio": self.median[first] / self.median[side],
            "ratio_of_minima": self.least[first] / self.least[side],
            "equal": True,
            "error": self.error,
            "seconds": self.median,
            "seconds_min": self.least,
            "runs": self.runs,
            **({"runs_wanted": self.wanted} if self.runs < self.wanted else {}),
            "peak_bytes": self.peak_bytes,
            **({"compile_seconds": compiling} if compiling else {}),
        }


Case = dict[str, Any]
"""Sizes, `ratio`, `equal`, and whatever else a part reports; plain numbers, strings and dictionaries."""


def compare(
    setting: Setting,
    sides: Mapping[str, Run],
    *,
    also: Mapping[str, Run] | None = None,
    tolerance: float | None = None,
    measure: str = "largest",
) -> Comparison:
    """Compare outputs, then time all sides in turns (A, B, A, B, ...).

    Args:
        sides: what each runs; returns a tensor, or several. The first is what is compared with.
        also: what is timed beside them, and computes something else.
        tolerance: see `TOLERANCE`.
        measure: of the difference: "largest" (share of the largest value), or "norm" for gradients, which
            jump where a place crosses from one cell to the next.
    """
    # 1. Outputs and memory; also the first warm-up.
    outputs: dict[str, list[Tensor]] = {}
    peaks, first = {}, {}
    for name, run in sides.items():
        # What counts tensors on a CPU keeps PyTorch from compiling.
        is_counted = setting.is_gpu or not name.endswith(COMPILED)
        begin = time.perf_counter()
        with peak_bytes(setting.device) if is_counted else nullcontext({}) as peak:
            outputs[name] = _tensors(run())
        first[name] = time.perf_counter() - begin
        if is_counted:
            peaks[name] = peak["bytes"]
    names = list(outputs)
    expected = outputs[names[0]]
    measure = "norm" if setting.dtype in HALF else measure
    error = {name: _difference(outputs[name], expected, measure) for name in names}
    limit = TOLERANCE[setting.dtype] if tolerance is None else tolerance
    equal = all(each <= limit for each in error.values())
    del outputs, expected
    if not equal:
        return Comparison(error=error, equal=False)

    # 2. How often each runs in its turn.
    clock = gpu_clock(setting.device) if setting.is_gpu else cpu_clock
    repeats = {}
    timed = {**sides, **(also or {})}
    for name, run in timed.items():
        is_slow = first.get(name, 0) > 1 and not name.endswith(COMPILED)
        duration = first[name] if is_slow else clock(run, 1)
        repeats[name] = max(1, round(setting.turn / max(1e-7, duration))) if setting.has(0) else 1

    # 3. Time, in turns.
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while _wants_more(setting, len(seconds[names[0]]), time.perf_counter() - begin):
            for name, run in timed.items():
                seconds[name].append(clock(run, repeats[name]))
    finally:
        gc.enable()
    return Comparison(
        error=error,
        equal=True,
        median={name: statistics.median(each) for name, each in seconds.items()},
        least={name: min(each) for name, each in seconds.items()},
        runs=len(seconds[names[0]]),
        wanted=setting.least,
        first=first,
        peak_bytes=peaks,
    )


def exact_first(setting: Setting, case: Callable[[Setting], Case]) -> Case:
    """A case in the precision wanted; in half precision, one in single precision is compared before."""
    if setting.dtype not in HALF:
        return case(setting)
    brief = replace(setting, least=1, seconds=0.0, patience=0.0, turn=0.0, compiles=False)
    strict = case(replace(brief, dtype=torch.float32))
    result = case(setting)
    return {**result, "equal": result["equal"] and strict["equal"], "error_in_float32": strict["error"]}


def _wants_more(setting: Setting, turns: int, spent: float) -> bool:
    if turns < FEWEST_TURNS:
        return True
    if not setting.has(0):
        return False
    if turns < setting.least:
        return spent < setting.patience
    return turns < MOST_TURNS and spent < setting.seconds


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """By PyTorch, for the shapes that it is called with."""
    return torch.compile(run, dynamic=False)


def in_turn(runs: Sequence[Run]) -> Run:
    """One run out of several that differ in their weights, so that no weight waits in a cache."""
    place = 0

    def run() -> Any:
        nonlocal place
        place = (place + 1) % len(runs)
        return runs[place]()

    return run


def wait(device: torch.device) -> None:
    """Until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- Clocks --------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """A clock; with one thread one of the work itself, so that waiting for a shared core does not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def cpu_clock(run: Run, repeats: int) -> float:
    """Seconds of one run, on average."""
    begin = cpu_seconds()
    for _ in range(repeats):
        run()
    return (cpu_seconds() - begin) / repeats


def gpu_clock(device: torch.device) -> Callable[[Run, int], float]:
    """A clock of the GPU's own time; its cache is overwritten before each run, outside the time."""
    flush = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device=device)

    def clock(run: Run, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            wait(device)
            total += begin.elapsed_time(end) / 1000
        return total / repeats

    return clock


# ---- Memory --------------------------------------------------------------------------------------


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[dict[str, int]]:
    """Most `bytes` held at once in what is made within; known when it is left."""
    counted = {"bytes": 0}
    if device.type == "cuda":
        gc.collect()
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield counted
        wait(device)
        counted["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with _LiveTensors() as live:
        yield counted
    counted["bytes"] = live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages of all tensors that operations make, while they live.

    What an operation uses inside and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {each.untyped_storage()._cdata for each in _dense_tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for each in _dense_tensors(result):
            storage = each.untyped_storage()
            key = storage._cdata
            if key not in old and key not in self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def saved_for_backward(excluded: Sequence[Tensor] = ()) -> Iterator[dict[str, int]]:
    """Counts what autograd keeps for the backward pass: `bytes` of distinct storages, when it is left.

    Args:
        excluded: weights and inputs, which are there anyway.
    """
    known = {each.untyped_storage().data_ptr() for each in excluded}
    storages: dict[int, int] = {}
    counted: dict[str, int] = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    counted["bytes"] = sum(storages.values())


# ---- Outputs -------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for part in value for each in _tensors(part)] if isinstance(value, list | tuple) else []


def _dense_tensors(value: Any) -> list[Tensor]:
    """Sparse ones are views of dense ones."""
    return [each for each in _tensors(value) if each.layout is torch.strided]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], measure: str) -> float:
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        difference, scale = (one.double() - other.double()), other.double()
        if measure == "norm":
            share = difference.norm() / scale.norm().clamp(min=1e-30)
        else:
            share = difference.abs().max() / scale.abs().max().clamp(min=1e-30)
        # NaN must not pass for equal.
        worst = max(worst, share.item() if share.isfinite() else float("inf"))
    return worst
