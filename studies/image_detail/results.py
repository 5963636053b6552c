"""What trials found, on the disk: one folder a trial, and a table of all."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_interleaved.files import make_folder, write_file
from studies.image_detail.settings import TrialSettings
from studies.image_detail.trial import CHANCE, Measurement, run_trial

RESULT, WEIGHTS, TABLE = "result.json", "weights.pt", "table.md"


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a trial that has ended in this folder."""
    path = folder / RESULT
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def run_in(
    folder: Path, settings: TrialSettings, on_measurement: Callable[[Measurement], None], **options: int
) -> dict[str, Any]:
    """Runs a trial and keeps its result and its weights in a folder; the result is the last file written."""
    trial, found = run_trial(settings, on_measurement, **options)
    make_folder(folder)
    trial.save(folder / WEIGHTS)
    result = {"settings": asdict(settings), "chance": CHANCE, "measurements": [asdict(m) for m in found]}
    write_file(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result


def write_table(run: Path, names: Sequence[str]) -> Path:
    """The last measurement of every trial that has ended, one line each."""
    lines = [
        "| trial | steps | CPU minutes | right at once | painted | on the place: all heads, best head |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        result = finished(run / name)
        if result is None:
            continue
        last = result["measurements"][-1]
        at_once, painted = (_shares(last[key]) for key in ("right_at_once", "right_painted"))
        on_place = ", ".join(f"{value:.3f}" for value in last["on_place"])
        lines.append(
            f"| {name} | {last['step']} | {last['cpu_minutes']:.1f} | {at_once} | {painted} | {on_place} |"
        )
    lines.append(f"\nChance of a patch: {CHANCE:.3f}.")
    write_file(run / TABLE, ("\n".join(lines) + "\n").encode())
    return run / TABLE


def _shares(by_task: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:.3f}" for task, value in by_task.items())
