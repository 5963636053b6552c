"""What training a part of a study has cost, and what made it: `cost.json` in the part's folder.

A part may be trained in several goes, on another machine or by other code: each go that differs is listed.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mm_interleaved.files import make_folder, put_aside, write_file
from mm_interleaved.recipes.storyworld.stage_cost import COUNTING
from mm_interleaved.runs import provenance
from mm_interleaved.runs.provenance import UNKNOWN
from mm_interleaved.training.settings import StageConfig

logger = logging.getLogger(__name__)

COST_NAME = "cost.json"
_NUMBER = (int, float)
_KINDS = {
    "steps": int, "is_finished": bool, "flops_a_step": _NUMBER, "wall_hours": _NUMBER, "core_hours": _NUMBER,
    "made_by": list,
}  # fmt: skip
_NEEDED = {"is_finished": "steps", "counting": "flops_a_step"}
"""Where the first is recorded, the second is too."""


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
    """What a part has cost so far; empty without a record. What is no record of it is put aside."""
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
    """Commit, machine and day of what the studies make now."""
    return provenance.made_by(Path(__file__).parent, "..")


def weights_name(model: Path) -> str:
    """The first twelve digits of the SHA-256 of a model folder's weights, so that two starts can be
    distinguished whatever they are called.
    """
    total = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]
