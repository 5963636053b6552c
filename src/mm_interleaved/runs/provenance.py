"""What made a result: the commit, the machine, the versions and the day. It names neither host nor user."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from mm_interleaved.versions import installed_version

UNKNOWN = "unknown"
"""Stands for what was not recorded, or cannot be found out."""


def made_by(folder: Path, *paths: str) -> dict[str, str]:
    """Commit, machine and day (UTC) of what is made now; arguments as of `commit`."""
    return {
        "commit": commit(folder, *paths),
        "machine": machine_name(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


@cache
def commit(folder: Path, *paths: str) -> str:
    """The commit of the checkout that `folder` is a part of, when it was first asked for.

    Args:
        paths: which files count, from `folder`; a plus sign stands behind the commit where one had changed.

    Returns:
        twelve digits; UNKNOWN where `folder` is not of a checkout.
    """
    try:
        # A package that is installed below somebody else's checkout is no part of that.
        _git(folder, "ls-files", "--error-unmatch", ".")
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--", *(paths or (".",))) else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def machine_name() -> str:
    """Processor, cores and threads, and the GPU where there is one."""
    import torch

    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} {'thread' if threads == 1 else 'threads'}"
    names = [f"{processor_name()}, {cores} of PyTorch"]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return "; ".join(names)


def processor_name() -> str:
    """The processor as its maker calls it, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of Python and of each package; None of one that is not installed."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
