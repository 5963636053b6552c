"""Every number of the recipe `scaling`. Light, so that a wrong one is refused before PyTorch is loaded."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from mm_interleaved.errors import UsageError
from mm_interleaved.training.settings import PROCESSES, RATE, SIZE, StageConfig, check_ranges
from mm_interleaved.typed_settings import SEED
from studies.ablation.settings import AblationConfig

_HEAD_DIM = 32

MAY_CHANGE = frozenset({"num_threads", "device"})
"""Settings that a run may be resumed with another value of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """`python -m studies scaling`: one name below, e.g. `text.steps`, is what `--set` takes."""

    start_from: str = "storyworld"
    """A finished model ("storyworld", a folder), whose vision tower all sizes share."""
    num_threads: Annotated[int, PROCESSES] = 0
    """Threads of PyTorch; the same number gives the same bits. 0 = OMP_NUM_THREADS, else one for each core
    that affinity and quota leave."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `auto`: a GPU where there is one."""
    seed: Annotated[int, SEED] = 1
    """Seed of weights and data."""
    widths: Annotated[tuple[int, ...], SIZE] = (64, 128, 256)
    """Widths of the language models."""
    layers: Annotated[tuple[int, ...], SIZE] = (3, 4, 6)
    """Their layers, as many numbers as there are widths."""
    slot_batch_size: Annotated[int, SIZE] = 64
    """Images a step of the slots' stage."""
    synchronizer_learning_rate: Annotated[float, RATE] = 1e-3
    """Learning rate of the synchronizers; Muon's rate for matrices is too high for them."""
    slots: StageConfig = field(default_factory=lambda: AblationConfig().slots)
    """First stage, once a size: the slots learn to hold all that an image shows."""
    text: StageConfig = field(
        default_factory=lambda: replace(AblationConfig().text, steps=1500, decay_fraction=0.0)
    )
    """Second stage: the language model. Its rate stays high, so that all points of a curve compare."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.widths or len(self.widths) != len(self.layers):
            raise UsageError(
                "widths and layers must be as many numbers, at least one, "
                f"found {len(self.widths)} and {len(self.layers)}"
            )
        if len(set(self.widths)) < len(self.widths):
            raise UsageError(f"widths must differ from each other, found {_listed(self.widths)}")
        for width in self.widths:
            if width % (2 * num_heads(width)):
                raise UsageError(
                    f"widths must be multiples of twice their heads (2, or one for {_HEAD_DIM} channels), "
                    f"found {width}"
                )


def num_heads(width: int) -> int:
    """Attention heads of a width."""
    return max(2, width // _HEAD_DIM)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
