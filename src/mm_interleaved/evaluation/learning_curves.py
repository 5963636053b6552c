"""How the shipped model learned, and what it took: a curve a stage, and multiplications counted.

training_log.jsonl (lines of several runs) -> learning_curves.png
recipe's stages on the finished model -> FLOPs a step, times the steps in the log
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.evaluation.ablation_page import load_pyplot
from mm_interleaved.model_source import find_model
from mm_interleaved.processing import MMInterleavedProcessor
from mm_interleaved.recipes.ablation import mean_flops
from mm_interleaved.recipes.storyworld import IMAGE_MIXTURES, TEXT_MIXTURES, StoryWorldConfig
from mm_interleaved.training.data import DocumentBatches, storyworld_pixels
from mm_interleaved.training.image_codec import ImageCodecStage
from mm_interleaved.training.image_side import ImageSideStage
from mm_interleaved.training.loop import Stage
from mm_interleaved.training.painter import PainterStage
from mm_interleaved.training.text_side import TextSideStage
from mm_interleaved.training.vision_side import VisionSideStage

NO_LOSSES = ("step", "lr", "norm", "memory_gb", "mfu")

Lines = Sequence[Mapping[str, Any]]


def by_stage(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of each stage, in the order of the log."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stages.setdefault(line["stage"], []).append(line)
    return stages


def steps_of(lines: Lines) -> int:
    """Steps of all runs of a stage together: each run counts its last line, one that names none is a run."""
    last: dict[str, int] = {}
    for line in lines:
        run = str(line.get("run", ""))
        last[run] = max(last.get(run, 0), int(line["step"]))
    return sum(last.values())


def plot_curves(lines: Lines, path: Path) -> None:
    """One panel a stage: all its losses over its steps, each run a line of its own."""
    pyplot = load_pyplot()
    stages = by_stage(lines)
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(3.2 * len(stages), 3.0), layout="constrained", squeeze=False
    )
    for axis, (stage, members) in zip(axes[0], stages.items(), strict=True):
        for name, points in losses_of(members).items():
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(title=stage, xlabel="step", yscale="log")
        axis.legend(frameon=False, fontsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def losses_of(lines: Lines) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of each loss of each run, whatever is positive and no rate."""
    curves: dict[str, list[tuple[int, float]]] = {}
    many = len({line.get("run") for line in lines}) > 1
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in NO_LOSSES and "/s" not in name and value > 0:
                label = f"{name}, {line.get('run')}" if many else name
                curves.setdefault(label, []).append((int(line["step"]), float(value)))
    return curves


def flops_a_step(model_name: str, config: StoryWorldConfig) -> dict[str, float]:
    """Multiplications and additions of a step of each stage of the recipe, by PyTorch's count."""
    folder = find_model(model_name)
    model, processor = load_model(folder, dtype="float32"), MMInterleavedProcessor.from_pretrained(folder)
    settings = {"batch_size": config.image_batch_size, "pool_batches": 1, "repeats": 4}

    def documents(mixtures: Any, **options: bool) -> DocumentBatches:
        return DocumentBatches(processor, mixtures, seed=config.seed, **options)

    # Later stages freeze what earlier ones train: each is counted as soon as it is made.
    makers: dict[str, Any] = {
        "vae": lambda: ImageCodecStage(
            model.image_decoder.vae, storyworld_pixels(config.seed), batch_size=config.batch_size,
            detail_weight=config.detail_weight, kl_weight=config.kl_weight,
        ),
        "vision": lambda: VisionSideStage(
            model.vision, seed=config.seed, batch_size=config.vision_batch_size
        ),
        "text": lambda: TextSideStage(model, documents(TEXT_MIXTURES)),
        "painter": lambda: PainterStage(model, documents(IMAGE_MIXTURES, target_pixels=True), **settings),
        "image": lambda: ImageSideStage(model, documents(IMAGE_MIXTURES, target_pixels=True), **settings),
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        stage: Stage = make()
        found[name] = mean_flops(stage, num_batches=6 if name == "text" else 2)
    return found
