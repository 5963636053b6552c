"""A small scaling study: the same reader in three sizes, trained for as many steps on the same documents.

Documents are made on the fly and none is seen twice, so the training loss is what a validation loss would be.
`evaluation.scaling` draws the curves and says what more compute should give.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mm_interleaved.recipes.ablation import AblationConfig, Workshop
from mm_interleaved.recipes.ablation_twins import Reader, TwinSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """`mm-interleaved train scaling`: one name below, e.g. `steps`, is what `--set` takes."""

    start_from: str = "storyworld"
    """A finished model ("storyworld", a folder), whose vision tower all sizes share."""
    num_threads: int = 2
    """Threads of PyTorch."""
    seed: int = 1
    """Seed of weights and data."""
    steps: int = 1500
    """Steps of each reader; the learning rate stays high, so that every point of a curve can be compared."""
    slot_steps: int = 250
    """Steps of the slots' stage, once a size."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Widths of the language models."""
    layers: tuple[int, ...] = (3, 4, 6)
    """Their layers."""
    ablation: AblationConfig = field(default_factory=AblationConfig)
    """What readers are trained with."""


def train(config: ScalingConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains a reader of each size, each in a folder of its own; returns `folder`."""
    torch.set_num_threads(config.num_threads)
    for width, layers in zip(config.widths, config.layers, strict=True):
        base = config.ablation
        settings = replace(
            base,
            start_from=config.start_from,
            seed=config.seed,
            sizes=TwinSizes(text_dim=width, text_layers=layers, text_heads=max(2, width // 32)),
            slots=replace(base.slots, steps=config.slot_steps),
            text=replace(base.text, steps=config.steps, decay_fraction=0.0),
        )
        Workshop(settings, size_folder(folder, width), show_progress).read(Reader(seed=config.seed))
    return folder


def size_folder(folder: Path, width: int) -> Path:
    """Where a run keeps the size of this width."""
    return folder / f"width-{width}"
