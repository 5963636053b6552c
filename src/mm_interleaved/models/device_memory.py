"""How much memory a device and its host have left, as the system says; nothing is allocated to find out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mm_interleaved.devices import CONTROL_GROUPS, describe, fast_formats
from mm_interleaved.models.memory_plan import Room

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")


def room_of(device: torch.device) -> Room:
    """The memory of a device of this machine, as far as it is free."""
    host = host_free()
    return Room(
        device=describe(device),
        device_type=device.type,
        free=host if device.type == "cpu" else _device_free(device),
        host_free=host,
        fast_formats=fast_formats(device),
    )


def host_free(meminfo: Path = MEMINFO, control_groups: Path = CONTROL_GROUPS) -> int:
    """Bytes that a process may still take of the host's memory: what the system has, within its container."""
    free = _available(meminfo)
    limit, used = (_number(control_groups / name) for name in ("memory.max", "memory.current"))
    if limit is None:
        limit, used = (
            _number(control_groups / "memory" / name)
            for name in ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
    return free if limit is None else max(0, min(free, limit - (used or 0)))


def _available(meminfo: Path) -> int:
    """Of the whole system, without what its caches would give back."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(kilobytes) * 1024
    except (OSError, ValueError):
        # Systems without that file say how much there is in all.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    """A limit of a control group; None where it sets none ("max", or a number beyond all memories)."""
    try:
        value = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return value if value < 2**60 else None


def _device_free(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_free()
