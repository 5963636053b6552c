"""Every number of the recipe `ablation`. Light, so that a wrong one is refused before PyTorch is loaded."""

from dataclasses import dataclass, field
from typing import Annotated

from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.storyworld.former_names import FORMER_STAGES
from mm_interleaved.training.settings import FACTOR, PROCESSES, RATE, SIZE, StageConfig, check_ranges
from mm_interleaved.typed_settings import SEED
from studies.ablation.variants import chosen_variants


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSizes:
    """The numbers of a variant's language model; the other parts are those of the finished model."""

    text_dim: Annotated[int, SIZE] = 128
    """Width of the language model."""
    text_layers: Annotated[int, SIZE] = 4
    """Its layers; every second has a synchronizer, the first among them."""
    text_heads: Annotated[int, SIZE] = 4
    """Attention heads of each."""
    max_context_images: Annotated[int, SIZE] = 5
    """Earlier images that the image decoder can distinguish: all of a story."""

    def __post_init__(self) -> None:
        check_ranges(self)
        # Positions turn pairs of channels, so each head needs an even number of them.
        if self.text_dim % (2 * self.text_heads):
            raise UsageError(
                f"text_dim must be a multiple of twice text_heads ({2 * self.text_heads}), "
                f"found {self.text_dim}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationConfig:
    """`python -m studies ablation`: one name below, e.g. `text.steps`, is what `--set` takes."""

    start_from: str = "storyworld"
    """A finished model ("storyworld", a folder): all variants share its vision tower, VAE and first U-Net."""
    variants: tuple[str, ...] = ()
    """Which variants, by name, e.g. both-1,neither-1. Empty: all."""
    seed: Annotated[int, SEED] = 1
    """Seed of the slots' stage, which variants with the same number of slots share."""
    num_threads: Annotated[int, PROCESSES] = 0
    """Threads of PyTorch; the same number gives the same bits. 0 = OMP_NUM_THREADS, else one for each core
    that affinity and quota leave."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `auto`: a GPU where there is one."""
    sizes: VariantSizes = field(default_factory=VariantSizes)
    slot_batch_size: Annotated[int, SIZE] = 64
    """Images a step of the slots' stage."""
    image_batch_size: Annotated[int, SIZE] = 32
    """Images a step of the U-Nets' stage."""
    pool_batches: Annotated[int, SIZE] = 24
    """U-Nets: batches of documents that are read at once."""
    detail_weight: Annotated[float, FACTOR] = 4.0
    """U-Nets: extra weight beside edges."""
    badge_weight: Annotated[float, FACTOR] = 20.0
    """U-Nets: extra weight of badges."""
    synchronizer_learning_rate: Annotated[float, RATE] = 1e-3
    """Language models: learning rate of the synchronizers; Muon's rate for matrices is too high for them."""
    slots: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=250, learning_rate=4e-3, optimizer="muon", warmup_steps=30, use_bfloat16=None
        )
    )
    """First stage, once for each number of slots: they learn to hold all that an image shows."""
    text: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=1000, learning_rate=3e-3, optimizer="muon", warmup_steps=50, ema_decay=0.99,
            use_bfloat16=None,
        )
    )  # fmt: skip
    """Second stage, once for each language model: it learns to read images and to write."""
    unet: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=300, learning_rate=5e-4, warmup_steps=30, ema_decay=0.99, use_bfloat16=None
        )
    )
    """Third stage, once for each image decoder: its U-Net learns to generate what earlier images show."""

    def __post_init__(self) -> None:
        check_ranges(self)
        chosen_variants(self.variants)


MAY_CHANGE = frozenset({"variants", "num_threads", "device"})
"""Settings that a run may be resumed with another value of: all variants stay trained alike."""
FORMER_NAMES = {"twins": "variants", **FORMER_STAGES}
"""Names of settings in runs of the first release."""
