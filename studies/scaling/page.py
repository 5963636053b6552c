"""What the scaling study found: loss against compute for each size, and a power law of more.

DOCS/scaling_results.json   settings and provenance; of each size: FLOPs a step, the curve, what it cost
DOCS/images/scaling.png     the curves, and the law fitted to the best loss at each compute
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.recipes.run import SETTINGS_NAME
from mm_interleaved.training.metrics import read_log
from mm_interleaved.training.settings import LOG_NAME
from mm_interleaved.typed_settings import from_record, to_record
from studies.ablation.variants import LanguageVariant
from studies.cost import read_cost
from studies.plots import load_pyplot, plain_axes, plain_numbers, save_figure
from studies.provenance import provenance_of
from studies.scaling.recipe import ScalingConfig, size_folder

_WINDOW = 5
"""Lines of the log that a point of a curve is the mean of: steps differ in what their batches hold."""
_WARM = 0.2
"""Share of each curve that is left out of the fit: the start has no bearing on the end."""
FACTORS = (10, 1000)
"""How many times the largest compute the law is evaluated at."""


def write_scaling(run: Path, docs: Path) -> dict[str, Any]:
    """Writes results and plot of the sizes of a run; returns the results.

    Raises:
        UsageError: no run, no size has been trained, or matplotlib is missing.
    """
    config = _settings(run)
    sizes = [size for width in config.widths if (size := _size(run, width, config.seed)) is not None]
    if not sizes:
        raise UsageError(f"{run}: no size has been trained yet")
    law = fit_law(envelope([size["curve"] for size in sizes]))
    most = max(compute for size in sizes for compute, _ in size["curve"])
    expected = {str(factor): round(law_loss(law, factor * most), 4) for factor in FACTORS} if law else {}
    results = {
        **provenance_of([cost for size in sizes for cost in size["cost"].values()]),
        "settings": to_record(config),
        "sizes": sizes,
        "law": law,
        "largest_compute": most,
        "expected_at_times": expected,
    }
    make_folder(docs / "images")
    write_file(docs / "scaling_results.json", (json.dumps(results, indent=1) + "\n").encode())
    _plot(results, docs / "images" / "scaling.png")
    return results


def _settings(run: Path) -> ScalingConfig:
    """The settings that a run was trained with."""
    path = run / SETTINGS_NAME
    if not path.exists():
        raise UsageError(f"{run}: holds no run ({SETTINGS_NAME} is not there)")
    return from_record(ScalingConfig, json.loads(path.read_text()).get("settings"), str(path))


def _size(run: Path, width: int, seed: int) -> dict[str, Any] | None:
    language = LanguageVariant(seed=seed)
    folder = size_folder(run, width) / language.name
    cost = read_cost(folder)
    if not (folder / LOG_NAME).exists() or not cost:
        return None
    lines = [line for line in read_log(folder / LOG_NAME) if "text" in line]
    groups = [lines[i : i + _WINDOW] for i in range(0, len(lines) - _WINDOW + 1, _WINDOW)]
    curve = [
        (cost["flops_a_step"] * group[-1]["step"], sum(line["text"] for line in group) / len(group))
        for group in groups
    ]
    return {
        "width": width,
        "flops_a_step": cost["flops_a_step"],
        "core_hours": cost["core_hours"],
        "cost": {"slots": read_cost(size_folder(run, width) / language.slots_name), "reader": cost},
        "curve": [(float(f"{compute:.4g}"), round(loss, 4)) for compute, loss in curve],
    }


Curve = Sequence[tuple[float, float]]


def envelope(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The lowest loss that any size has reached at each compute, along all points but the early ones."""
    points = sorted(point for curve in curves for point in curve[math.floor(_WARM * len(curve)) :])
    best: list[tuple[float, float]] = []
    for compute, loss in points:
        if not best or loss < best[-1][1]:
            best.append((compute, loss))
    return best


def fit_law(points: Curve) -> dict[str, float] | None:
    """`loss = factor * compute ** -exponent`, by least squares of logarithms; None of fewer than three."""
    if len(points) < 3:
        return None
    x, y = (np.log([point[axis] for point in points]) for axis in (0, 1))
    slope, intercept = np.polyfit(x, y, 1)
    return {"factor": float(np.exp(intercept)), "exponent": float(-slope)}


def law_loss(law: Mapping[str, float], compute: float) -> float:
    """The loss that the law expects of a compute in FLOPs."""
    return law["factor"] * compute ** -law["exponent"]


def _plot(results: Mapping[str, Any], path: Path) -> None:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for size in results["sizes"]:
        axes.plot(*zip(*size["curve"], strict=True), label=f"width {size['width']}")
    if results["law"]:
        reach = np.geomspace(results["largest_compute"] / 100, 1000 * results["largest_compute"], 50)
        axes.plot(reach, [law_loss(results["law"], c) for c in reach], "k:", label="power law")
        for factor in FACTORS:
            compute = factor * results["largest_compute"]
            loss = law_loss(results["law"], compute)
            axes.plot(compute, loss, "k.")
            # To the right above the falling line, or to the left below it, where the plot ends.
            place = {"xytext": (4, 5)} if factor == min(FACTORS) else {"xytext": (-6, -4), "ha": "right"}
            label = f"{factor:,} times the largest: {loss:.2f}"
            axes.annotate(label, (compute, loss), textcoords="offset points", fontsize=8, **place)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="text loss")
    axes.legend(frameon=False)
    plain_axes(axes)
    plain_numbers(axes, [0.1, 0.2, 0.5, 1, 2, 5])
    save_figure(figure, path)
