"""Which device computes, in which number format, on how many threads: decided here and nowhere else.

A number format is fast where the device has units that multiply in it. Without them a CPU takes 35 to 80
times as long as in float32, or 2.4 times where AVX-512 stands in for bfloat16; with them bfloat16 takes 0.4
times (products of 512 × 512, convolutions of 64 channels, one thread, 2026-11). Units are read off the
processor's flags rather than timed, so that a machine makes the same choice in every run.

Nothing here loads torch before it is asked something about a device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import UsageError, escape
from mm_interleaved.spelling import guess

if TYPE_CHECKING:
    import torch

FORMATS = ("float32", "bfloat16", "float16")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user names a number of threads; PyTorch obeys them by itself."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")

# The flag of any of these units, as `torch.cpu.get_capabilities` calls them (x86, then ARM).
_CPU_UNITS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "float16": ("avx512_fp16", "amx_fp16"),
}
# oneDNN multiplies with no later unit than ONEDNN_MAX_CPU_ISA names, whatever the processor has.
_CAP_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_CAPS_WITHOUT = {
    "bfloat16": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"),
    "float16": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"),
}


# ---- Devices -------------------------------------------------------------------------------------------


def torch_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one. Raises UsageError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"device: expected auto, cpu, cuda or mps, found {escape(name)!r}"
            f"{guess(name, ('cpu', 'cuda', 'mps'))}",
            field="device",
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name}: PyTorch finds no GPU here; use device=cpu or auto", field="device")
    try:
        # What computes keeps numbers; "meta" does not.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        sentence = escape(str(error).splitlines()[0])
        raise UsageError(f"device {name}: cannot be used here ({sentence})", field="device") from error
    return device


def first_device(device_map: Any) -> torch.device:
    """The device that a `device_map` of transformers begins with; a CPU only if it names nothing else.

    None, and the names of transformers' own strategies, are `torch_device("auto")`.
    """
    import torch

    if isinstance(device_map, Mapping):
        places = [str(place) for place in device_map.values() if str(place) not in ("cpu", "disk")]
        device_map = places[0] if places else "cpu"
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch_device("auto")
    # Numbers are GPUs.
    place = str(device_map)
    return torch.device("cuda", int(place)) if place.isdecimal() else torch.device(place)


def rank_device(name: str) -> torch.device:
    """The device on which this process trains: with "auto" its rank's GPU where there is one, else the CPU.

    Raises:
        UsageError: no such device, or none here.
    """
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = torch_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ---- Number formats ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """A number format, and one line about it where the user should know of the choice."""

    name: str
    """One of `FORMATS`."""
    remark: str = ""
    """What was chosen and why, if it is not what was asked for, or what is slow here; else empty."""


def cpu_formats(capabilities: Mapping[str, Any], environment: Mapping[str, str]) -> frozenset[str]:
    """The number formats in which a CPU is fast.

    Args:
        capabilities: flags, as `torch.cpu.get_capabilities` names them.
        environment: variables; one of oneDNN's may switch units off.
    """
    cap = environment.get(_CAP_VARIABLE, "").strip().upper()
    found = {
        name
        for name, units in _CPU_UNITS.items()
        if any(capabilities.get(unit) for unit in units) and cap not in _CAPS_WITHOUT[name]
    }
    return frozenset({"float32", *found})


def fast_formats(device: torch.device) -> frozenset[str]:
    """The number formats in which a device is fast."""
    import torch

    if device.type == "cpu":
        return cpu_formats(cpu_capabilities(), os.environ)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return frozenset({"float32", "float16"})
    return frozenset(FORMATS)


def cpu_capabilities() -> Mapping[str, Any]:
    """The flags of this machine's processor; none where this PyTorch cannot tell."""
    import torch

    tell = getattr(torch.cpu, "get_capabilities", None)
    return {} if tell is None else tell()


def weight_format(saved: str, device: torch.device) -> NumberFormat:
    """In which format to keep the weights of a file that is to be computed with on a device.

    As saved where the device is fast in it, else float32.

    Args:
        saved: by torch's name; empty where the file holds no floating-point numbers.
    """
    if saved not in FORMATS or saved in fast_formats(device):
        return NumberFormat(saved or "float32")
    return NumberFormat(
        "float32",
        f"weights saved in {saved} are kept in float32, because {describe(device)} has no units for {saved}; "
        f"name a dtype to have another",
    )


def model_format(asked: Any, saved: str, device: torch.device) -> NumberFormat:
    """In which format to keep the weights of a model that is loaded for a device.

    Args:
        asked: a format by name or as torch's dtype, which is then used; None or "auto": see `weight_format`.
        saved: the format of the file; only read where none is asked for.

    Raises:
        UsageError: torch has no such type.
    """
    import torch

    if asked in (None, "auto"):
        return weight_format(saved, device)
    name = str(asked).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise UsageError(f"dtype: expected a floating-point type of torch, found {name!r}", field="dtype")
    return NumberFormat(name, slowness(name, device))


def training_format(asked: str | None, device: torch.device) -> NumberFormat:
    """In which format convolutions and matrix products of a training run are computed.

    Args:
        asked: one of `FORMATS`, which is then used, or None: the fastest that trains as well as bfloat16.
    """
    fast = fast_formats(device)
    if asked is not None:
        return NumberFormat(asked, slowness(asked, device))
    if "bfloat16" in fast:
        return NumberFormat("bfloat16")
    # On a CPU nobody has tried float16, which needs a scaled loss; on GPUs before bfloat16 it is the custom.
    name = "float16" if device.type == "cuda" else "float32"
    return NumberFormat(name, f"training in {name}, because {describe(device)} has no units for bfloat16")


def slowness(name: str, device: torch.device) -> str:
    """One line if a device is slow in a format; empty if it is fast."""
    if name not in FORMATS or name in fast_formats(device):
        return ""
    return f"{name} is slow here: {describe(device)} has no units for it, float32 may be many times as fast"


def describe(device: torch.device) -> str:
    """A device in a few words, for a sentence."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_capabilities().get("cpu_name") if device.type == "cpu" else None
    return f"this {device.type.upper()} ({name})" if name else f"this {device.type.upper()}"


# ---- Threads -------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may use: the affinity mask, and within it the quota of its control group."""
    mask = getattr(os, "sched_getaffinity", None)
    cores = len(mask(0)) if mask is not None else os.cpu_count() or 1
    quota = cpu_quota(CONTROL_GROUPS)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(control_groups: Path, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that this process's control groups grant it; None where they set no limit.

    Args:
        control_groups: where the kernel shows them (version 2; of version 1 the `cpu` controller).
        membership: the file that states in which of them this process is.
    """
    quotas = []
    for controllers, path in _memberships(membership):
        root = control_groups if not controllers else control_groups / controllers
        # A group's limit binds all groups below it. In a container the path may be that of the host, of which
        # only the root is to be seen.
        for folder in _upwards(root, path):
            quotas += _quota_of(folder)
    return min(quotas, default=None)


def threads_by_name(environment: Mapping[str, str]) -> bool:
    """The environment names a number of threads."""
    return any(environment.get(name, "").strip() for name in THREAD_VARIABLES)


def limit_threads(environment: Any = os.environ) -> None:
    """Keeps a program, and those it starts, within the cores that it may use; before torch is loaded.

    PyTorch sees the affinity mask by itself, a quota never.
    """
    if not threads_by_name(environment):
        environment["OMP_NUM_THREADS"] = str(usable_cores())


def describe_threads(number: int) -> str:
    """Why a program computes on so many threads, in a few words."""
    if number != usable_cores() and threads_by_name(os.environ):
        named = next(name for name in THREAD_VARIABLES if os.environ.get(name, "").strip())
        return f"{named} is {os.environ[named]}"
    quota = cpu_quota(CONTROL_GROUPS)
    limit = "" if quota is None else f", whose control group grants {quota:g}"
    return f"{usable_cores()} of {os.cpu_count()} cores are usable by this process{limit}"


def use_threads(number: int) -> int:
    """Sets and returns PyTorch's number of threads.

    Args:
        number: as many; 0: as the environment says, else one for each usable core.
    """
    import torch

    if number:
        torch.set_num_threads(number)
    elif not threads_by_name(os.environ):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return torch.get_num_threads()


def _memberships(membership: Path) -> list[tuple[str, str]]:
    """(controllers, path) of the groups that may limit processor time; no controllers: version 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = [line.split(":", 2)[1:] for line in lines if line.count(":") >= 2]
    return [(names, path) for names, path in found if not names or "cpu" in names.split(",")]


def _upwards(root: Path, path: str) -> list[Path]:
    folder = root / path.lstrip("/")
    inside = [folder, *folder.parents]
    return inside[: inside.index(root) + 1] if root in inside else [root]


def _quota_of(folder: Path) -> list[float]:
    """The limit that a group itself sets, as a list of one; empty without one."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        share = float(quota) / float(period) if quota.strip() != "max" else -1.0
    except (OSError, ValueError, ZeroDivisionError):
        return []
    return [share] if share > 0 else []
