"""What a part of a run that compares has cost, and what made it: cost.json in the part's folder.

A part may be trained in several goes, on another machine or by other code: each go that differs is named.
"""

import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mm_interleaved.files import make_folder, put_aside, write_file
from mm_interleaved.recipes.storyworld.stage_cost import COUNTING
from mm_interleaved.training.settings import StageConfig

logger = logging.getLogger(__name__)

COST_NAME = "cost.json"
_NUMBER = (int, float)
_KINDS = {
    "steps": int, "is_finished": bool, "flops_a_step": _NUMBER, "wall_hours": _NUMBER, "core_hours": _NUMBER,
    "made_by": list,
}  # fmt: skip
_NEEDED = {"is_finished": "steps", "counting": "flops_a_step"}
"""Where the first is told, the second is too."""
UNKNOWN = "unknown"
"""Said of what was not recorded, or cannot be found out."""
_PACKAGE = Path(__file__).parents[1]


def with_cost(
    folder: Path,
    config: StageConfig,
    *,
    flops_a_step: Callable[[], float],
    work: Callable[[], object],
    start: str = UNKNOWN,
) -> None:
    """Does a stage's work and adds what it cost to `cost.json` in its folder, over all its parts.

    Of a part that has been finished before, nothing changes but a count of an earlier version.

    Args:
        flops_a_step: counts the multiplications of a step.
        work: trains what is missing, which may be nothing.
        start: which weights it starts from, as `weights_name` names them.
    """
    path = folder / COST_NAME
    cost: Mapping[str, Any] = read_cost(folder)
    is_finished = cost.get("is_finished", False) and cost["steps"] >= config.steps
    if is_finished:
        work()
    is_counted = cost.get("counting") == COUNTING
    if is_finished and is_counted:
        return
    flops = cost["flops_a_step"] if is_counted else flops_a_step()
    steps = cost["steps"] if is_finished else config.steps
    counted = {"counting": COUNTING, "flops_a_step": flops, "flops": flops * steps}
    if is_finished:
        _write_cost(path, {**cost, **counted})
        return
    wall, cpu = time.monotonic(), time.process_time()
    made = {**made_by(), "start": start}
    try:
        work()
        is_finished = True
    finally:
        record = {
            "steps": steps,
            "is_finished": is_finished,
            **counted,
            "wall_hours": cost.get("wall_hours", 0.0) + (time.monotonic() - wall) / 3600,
            "core_hours": cost.get("core_hours", 0.0) + (time.process_time() - cpu) / 3600,
            "threads": torch.get_num_threads(),
            "made_by": [*(one for one in cost.get("made_by", ()) if one != made), made],
        }
        _write_cost(path, record)


def _write_cost(path: Path, record: Mapping[str, Any]) -> None:
    make_folder(path.parent)
    write_file(path, (json.dumps(record, indent=2) + "\n").encode())


def read_cost(folder: Path) -> dict[str, Any]:
    """What a part has cost so far; empty where it does not tell. What is no record of it is put aside."""
    path = folder / COST_NAME
    if not os.path.lexists(path):
        return {}
    try:
        cost = json.loads(path.read_text())
        wrong = [name for name, kind in _KINDS.items() if name in cost and not isinstance(cost[name], kind)]
        wrong += [needed for name, needed in _NEEDED.items() if name in cost and needed not in cost]
        if wrong or not isinstance(cost, dict):
            raise ValueError(wrong)
    except (OSError, ValueError, TypeError, RecursionError):
        logger.warning("%s: damaged, now %s", path, put_aside(path).name)
        return {}
    return cost


def made_by() -> dict[str, str]:
    """Commit, machine and day (UTC) of what is made now, in words that name neither host nor user."""
    return {"commit": commit(), "machine": machine_name(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


@cache
def commit() -> str:
    """The commit of this code when it was first asked for, with a plus sign where its files had changed;
    "unknown" where it is not the code of a checkout.
    """
    try:
        # A package that is installed below somebody else's checkout is no part of that.
        _git("ls-files", "--error-unmatch", Path(__file__).name, at=Path(__file__).parent)
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(*arguments: str, at: Path = _PACKAGE) -> str:
    command = ["git", "-C", str(at), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def weights_name(model: Path) -> str:
    """The first twelve digits of the SHA-256 of a model folder's weights, so that two starts can be told
    apart whatever they are called.
    """
    total = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def machine_name() -> str:
    """Processor, cores and threads, and the GPU where there is one."""
    threads = torch.get_num_threads()
    name = f"{_processor()}, {os.cpu_count()} cores, {threads} {'thread' if threads == 1 else 'threads'}"
    names = [f"{name} of PyTorch"]
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
