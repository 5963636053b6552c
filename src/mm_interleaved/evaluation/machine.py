"""What numbers were measured on, in words that name neither host nor user."""

import os
import platform
from pathlib import Path

import torch


def machine_name() -> str:
    """Processor, cores and threads, and the GPU where there is one."""
    names = [f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch"]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return "; ".join(names)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
