"""How the shipped model learned, and what it took: loss curves of each stage, and multiplications counted.

training_log.jsonl (lines of several runs) -> DOCS/images/learning_curves.png
recipe's stages on the finished model -> FLOPs a step, times the steps in the log -> DOCS/learning_curves.md
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import InputError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.recipes.storyworld.batches import DocumentBatches, storyworld_pixels
from mm_interleaved.recipes.storyworld.former_names import present_line
from mm_interleaved.recipes.storyworld.image_stage import ImageStage
from mm_interleaved.recipes.storyworld.recipe import IMAGE_BATCHES, TEXT_BATCHES, StoryWorldConfig
from mm_interleaved.recipes.storyworld.stage_cost import average_flops
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.unet_stage import UNetStage
from mm_interleaved.recipes.storyworld.vae_stage import VAEStage
from mm_interleaved.recipes.storyworld.vision_stage import VisionStage
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.training.stage import Stage
from studies.plots import load_pyplot, plain_axes, plain_numbers, save_figure
from studies.published_costs import costs_text, study_costs

logger = logging.getLogger(__name__)

NO_LOSSES = ("step", "seconds", "lr", "norm", "memory_gb", "mfu")

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RunCost:
    """What one run of a stage took."""

    stage: str
    run: str
    """Its name in the log; the stage's where it has none."""
    steps: int
    flops_a_step: float | None
    """Of the stage as the recipe has it now; None where it was not counted."""
    hours: float | None
    """None where the log has no seconds."""

    @property
    def flops(self) -> float | None:
        """Of all its steps."""
        return None if self.flops_a_step is None else self.steps * self.flops_a_step


def read_stages(path: Path | None) -> list[dict[str, Any]]:
    """The lines of a log of stages, under the present names of stages and losses; a torn one is left out.

    Args:
        path: a log; None for the shipped model's.

    Raises:
        InputError: no such file, no lines, or one that is not a stage's.
    """
    path = find_model("storyworld") / "training_log.jsonl" if path is None else path
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a log in UTF-8, found other bytes") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            logger.warning("%s:%d: left out a torn line", path, number)
            continue
        for field, kind in (("stage", str), ("step", int)):
            found = line.get(field) if isinstance(line, dict) else None
            if type(found) is not kind:
                raise InputError(
                    f"{path}:{number}: {field}: found {found!r}, expected the {field} of a training log",
                    field=field,
                )
        lines.append(present_line(line))
    if not lines:
        raise InputError(f"{path}: found no lines, expected those of a training log")
    return lines


def by_stage(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of each stage, in the order of the log."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stages.setdefault(line["stage"], []).append(line)
    return stages


def costs_of(lines: Lines, flops_a_step: Mapping[str, float]) -> list[RunCost]:
    """What each run took, stage by stage; lines that name no run are one.

    Steps and seconds of a run count from its start, so its last line has both.
    """
    costs = []
    for stage, members in by_stage(lines).items():
        for run in dict.fromkeys(line.get("run") for line in members):
            of_run = [line for line in members if line.get("run") == run]
            seconds = [line["seconds"] for line in of_run if isinstance(line.get("seconds"), int | float)]
            costs.append(
                RunCost(
                    stage=stage,
                    # Runs are named in the log, which keeps the former name of the stage.
                    run=str(run or stage).replace("painter", "U-Net"),
                    steps=max(int(line["step"]) for line in of_run),
                    flops_a_step=flops_a_step.get(stage),
                    hours=max(seconds) / 3600 if seconds else None,
                )
            )
    return costs


def write_curves(lines: Lines, flops_a_step: Mapping[str, float], docs: Path, *, is_shipped: bool) -> Path:
    """Writes page and plot; returns the page's path.

    Args:
        is_shipped: the lines are those of the shipped model, whose card names the machine.
    """
    make_folder(docs / "images")
    plot_curves(lines, docs / "images" / "learning_curves.png")
    path = docs / "learning_curves.md"
    page = curves_text(costs_of(lines, flops_a_step), is_shipped=is_shipped)
    write_file(path, (page + (costs_text(study_costs(docs)) if is_shipped else "")).encode())
    return path


def curves_text(costs: Sequence[RunCost], *, is_shipped: bool) -> str:
    """The page as Markdown: a line a run, and one for each stage of several runs."""
    rows = []
    for stage in dict.fromkeys(cost.stage for cost in costs):
        runs = [cost for cost in costs if cost.stage == stage]
        rows += [_row(cost.run, [cost]) for cost in runs]
        rows += [_row("all of the stage", runs)] if len(runs) > 1 else []
    rows += [_row("all stages", costs)] if len({cost.stage for cost in costs}) > 1 else []
    hardware = (
        "Hardware: two cores of a shared CPU, as the model's card says, which also has the minutes that\n"
        "stages took together where the log has no seconds. An empty cell was not recorded.\n"
        if is_shipped
        else ""
    )
    return f"""# How {"the shipped model" if is_shipped else "a model"} learned

Written by `python -m studies curves` out of the log of the training.
{hardware}
![Losses of each stage over its steps](images/learning_curves.png)

| stage | run | steps | FLOPs a step | FLOPs in all | hours |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

FLOPs are multiplications and additions, forward and backward, by PyTorch's count of a few steps of the stage
as the recipe has it now; earlier runs may have had other batches. Hours are given where the log has
seconds, and are "at least" so many where it has those of some runs only.
"""


def _row(name: str, costs: Sequence[RunCost]) -> str:
    """One line of the table, of one run or of several together."""
    is_one_stage = len({cost.stage for cost in costs}) == 1
    a_step = costs[0].flops_a_step if is_one_stage else None
    cells = [
        costs[0].stage if is_one_stage else "",
        name,
        f"{sum(cost.steps for cost in costs):,}",
        "" if a_step is None else f"{a_step:.2e}",
        _sum([cost.flops for cost in costs], ".2e"),
        _sum([cost.hours for cost in costs], ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def _sum(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{'' if len(known) == len(values) else 'at least '}{sum(known):{form}}"


def plot_curves(lines: Lines, path: Path) -> None:
    """One panel a stage: all its losses over its steps, its runs one after another with a line between."""
    pyplot = load_pyplot()
    stages = by_stage(lines)
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(3.4 * len(stages), 4.4), layout="constrained", squeeze=False
    )
    for axis, (stage, members) in zip(axes[0], stages.items(), strict=True):
        starts = run_starts(members)
        colours = pyplot.get_cmap("tab20").colors
        for index, (name, runs) in enumerate(losses_of(members).items()):
            colour = colours[index % len(colours)]
            for number, points in enumerate(runs.values()):
                # One entry of the legend, however many runs have the loss.
                label = name if number == 0 else None
                axis.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.2)
        for start in list(starts.values())[1:]:
            axis.axvline(start, color="#aaaaaa", linewidth=0.8, linestyle=":")
        axis.set(title=stage, xlabel="step" if len(starts) == 1 else "step of all runs", yscale="log")
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        plain_axes(axis)
        plain_numbers(axis)
    save_figure(figure, path)


def run_starts(lines: Lines) -> dict[Any, int]:
    """At which step of all runs of a stage together each run begins."""
    starts: dict[Any, int] = {}
    num_steps = 0
    for run in dict.fromkeys(line.get("run") for line in lines):
        starts[run] = num_steps
        num_steps += max(int(line["step"]) for line in lines if line.get("run") == run)
    return starts


def losses_of(lines: Lines) -> dict[str, dict[Any, list[tuple[int, float]]]]:
    """Of each loss of a stage the (step of all runs, loss) by run: whatever is positive and no rate."""
    starts = run_starts(lines)
    curves: dict[str, dict[Any, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in NO_LOSSES and "/s" not in name and value > 0:
                run = line.get("run")
                point = (starts[run] + int(line["step"]), float(value))
                curves.setdefault(name, {}).setdefault(run, []).append(point)
    return curves


def flops_a_step(model_name: str, config: StoryWorldConfig) -> dict[str, float]:
    """Multiplications and additions of a step of each stage of the recipe, by PyTorch's count."""
    folder = find_model(model_name)
    model, processor = load_model(folder, dtype="float32"), MMInterleavedProcessor.from_pretrained(folder)
    settings = {"batch_size": config.image_batch_size, "pool_batches": 24, "repeats": 4}

    def documents(kinds: Any, **options: bool) -> DocumentBatches:
        return DocumentBatches(processor, kinds, seed=config.seed, **options)

    # Later stages freeze what earlier ones train: each is counted as soon as it is made.
    makers: dict[str, Any] = {
        "vae": lambda: VAEStage(
            model.image_decoder.vae, storyworld_pixels(config.seed), batch_size=config.batch_size,
            detail_weight=config.detail_weight, kl_weight=config.kl_weight,
        ),
        "vision": lambda: VisionStage(
            model.vision, seed=config.seed, batch_size=config.vision_batch_size
        ),
        "text": lambda: TextStage(model, documents(TEXT_BATCHES)),
        "unet": lambda: UNetStage(model, documents(IMAGE_BATCHES, target_pixels=True), **settings),
        "image": lambda: ImageStage(model, documents(IMAGE_BATCHES, target_pixels=True), **settings),
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        stage: Stage = make()
        found[name] = average_flops(stage)
    return found
