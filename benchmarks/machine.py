"""What ran a benchmark: names and versions, and the rates that no program on it can exceed."""

import os
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.harness import cpu_clock, gpu_clock
from mm_interleaved.runs.provenance import package_versions, processor_name

PACKAGES = ("torch", "transformers", "diffusers", "triton", "deformops", "numpy")


class Rates(NamedTuple):
    """Measured in the same run: of a large copy (bytes read and written) and of a large matrix product."""

    bytes_a_second: float
    flops_a_second: float


@cache
def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of several copies and products."""
    is_gpu = device.type == "cuda"
    clock = gpu_clock(device) if is_gpu else cpu_clock
    tries = 20 if is_gpu else 5
    source = torch.empty((2**30 if is_gpu else 2**26), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copying = min(clock(lambda: target.copy_(source), 1) for _ in range(tries))
    side = 8192 if is_gpu else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiplying = min(clock(lambda: left @ right, 1) for _ in range(tries))
    return Rates(2 * source.numel() / copying, 2 * side**3 / multiplying)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Hardware and versions. No names of hosts or people."""
    facts: dict[str, Any] = {
        "hardware": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(PACKAGES),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["hardware"] = f"{properties.name}, {properties.total_memory >> 30} GiB"
        facts["versions"]["cuda"] = torch.version.cuda
        facts["clock_mhz"] = _gpu_clock_rate(device)
    return facts


def _gpu_clock_rate(device: torch.device) -> int | None:
    """Of the streaming multiprocessors, now; None where the driver does not report it."""
    try:
        return torch.cuda.clock_rate(device)
    except (RuntimeError, ModuleNotFoundError):
        return None
