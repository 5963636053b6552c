"""A small scaling study: the same reader in three sizes, trained for as many steps on the same documents.

Documents are made on the fly and none is seen twice, so the training loss is what a validation loss would be.
`evaluation.scaling` draws the curves and says what more compute should give.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.ablation import AblationConfig, Workshop
from mm_interleaved.recipes.ablation_twins import Reader, TwinSizes
from mm_interleaved.training.devices import chosen_device
from mm_interleaved.training.settings import StageConfig, check_least

_HEAD_DIM = 32

MAY_CHANGE = frozenset({"num_threads", "device"})
"""Settings that a run may be resumed with another value of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """`mm-interleaved train scaling`: one name below, e.g. `text.steps`, is what `--set` takes."""

    start_from: str = "storyworld"
    """A finished model ("storyworld", a folder), whose vision tower all sizes share."""
    num_threads: int = 2
    """Threads of PyTorch; the same number gives the same bits."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `auto`: a GPU where there is one."""
    seed: int = 1
    """Seed of weights and data."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Widths of the language models."""
    layers: tuple[int, ...] = (3, 4, 6)
    """Their layers, as many numbers as there are widths."""
    slot_batch_size: int = 64
    """Pictures a step of the slots' stage."""
    synchronizer_learning_rate: float = 1e-3
    """Learning rate of the synchronizers; Muon's rate for matrices is too high for them."""
    slots: StageConfig = field(default_factory=lambda: AblationConfig().slots)
    """First stage, once a size: the slots learn to tell all that a picture shows."""
    text: StageConfig = field(
        default_factory=lambda: replace(AblationConfig().text, steps=1500, decay_fraction=0.0)
    )
    """Second stage: the reader. Its learning rate stays high, so that all points of a curve compare."""

    def __post_init__(self) -> None:
        check_least(self, 0, "synchronizer_learning_rate")
        check_least(self, 1, "num_threads", "slot_batch_size")
        if not self.widths or len(self.widths) != len(self.layers):
            raise UsageError(
                "widths and layers must be as many numbers, at least one, "
                f"found {len(self.widths)} and {len(self.layers)}"
            )
        if len(set(self.widths)) < len(self.widths):
            raise UsageError(f"widths must differ from each other, found {_listed(self.widths)}")
        for width in self.widths:
            if width < 1 or width % (2 * _heads(width)):
                raise UsageError(
                    f"widths must be multiples of twice their heads (2, or one for {_HEAD_DIM} channels), "
                    f"found {width}"
                )
        if min(self.layers) < 1:
            raise UsageError(f"layers must be 1 or more, found {_listed(self.layers)}")


def train(config: ScalingConfig, folder: Path, *, show_progress: bool = False) -> Path:
    """Trains a reader of each size, each in a folder of its own; returns `folder`."""
    device = chosen_device(config.device)
    torch.set_num_threads(config.num_threads)
    for width, layers in zip(config.widths, config.layers, strict=True):
        settings = AblationConfig(
            start_from=config.start_from,
            num_threads=config.num_threads,
            device=config.device,
            seed=config.seed,
            sizes=TwinSizes(text_dim=width, text_layers=layers, text_heads=_heads(width)),
            slot_batch_size=config.slot_batch_size,
            synchronizer_learning_rate=config.synchronizer_learning_rate,
            slots=config.slots,
            text=config.text,
        )
        workshop = Workshop(settings, size_folder(folder, width), device, show_progress=show_progress)
        workshop.read(Reader(seed=config.seed))
    return folder


def size_folder(folder: Path, width: int) -> Path:
    """Where a run keeps the size of this width."""
    return folder / f"width-{width}"


def _heads(width: int) -> int:
    """Attention heads of a width."""
    return max(2, width // _HEAD_DIM)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
