"""Every number of the recipe `storyworld`. Light, so that a wrong one is refused before PyTorch is loaded."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from mm_interleaved.errors import UsageError
from mm_interleaved.training.settings import FACTOR, PROCESSES, RATE, SIZE, StageConfig, check_ranges
from mm_interleaved.typed_settings import SEED, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesConfig:
    """The numbers of the model."""

    latent_channels: Annotated[int, SIZE] = 4
    """Channels of the VAE's latents, 16 by 16 for an image."""
    vae_channels: Annotated[tuple[int, ...], SIZE] = (32, 64, 64)
    """Channels at 64, 32 and 16 pixels a side."""
    vision_dim: Annotated[int, SIZE] = 96
    """Width of the vision tower and of its pyramid (32, 16, 8 and 4 cells a side)."""
    num_slots: Annotated[int, SIZE] = 4
    """Image tokens an image takes in the language model."""
    text_dim: Annotated[int, SIZE] = 192
    """Width of the language model."""
    text_layers: Annotated[int, SIZE] = 5
    """Layers of the language model."""
    max_length: Annotated[int, SIZE] = 1024
    """Tokens that the language model can read."""
    unet_channels: Annotated[tuple[int, ...], SIZE] = (64, 96, 128, 128)
    """Channels at 16, 8, 4 and 2 latent cells a side."""
    conditioning_dim: Annotated[int, SIZE] = 128
    """Width of the U-Net's conditioning."""
    num_conditioning: Annotated[int, SIZE] = 16
    """Conditioning vectors."""
    pixel_levels: Annotated[int, Range(0, 3)] = 0
    """Of how many of the finest levels each cell also gets its own pixels through one linear layer."""
    image_levels: Annotated[tuple[int, ...], Range(0, 3)] = (1, 2)
    """Levels of the pyramid that the U-Net looks at: 0 has 32 cells a side, each further one half of that."""
    image_heads: Annotated[int, SIZE] = 4
    """Heads of each of the U-Net's synchronizers."""
    image_points: Annotated[int, SIZE] = 4
    """Points of each of these heads."""
    use_synchronizers: bool = True
    """False trains a variant that sees images through their slots only."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.image_levels or len(set(self.image_levels)) < len(self.image_levels):
            found = ", ".join(map(str, self.image_levels)) or "none"
            raise UsageError(f"sizes.image_levels: found {found}, expected different ones of 0, 1, 2, 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryWorldConfig:
    """`mm-interleaved train storyworld`: one name below, e.g. `image.steps`, is what `--set` takes."""

    seed: Annotated[int, SEED] = 1
    """Seed of weights, data and noise."""
    num_threads: Annotated[int, PROCESSES] = 0
    """Threads of PyTorch; the same number gives the same bits. 0 = OMP_NUM_THREADS, else one for each core
    that affinity and quota leave."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `auto`: a GPU where there is one."""
    start_from: str = ""
    """A finished model to train on ("storyworld", a folder): its VAE and vision tower stay. Empty: none."""
    boards: bool = False
    """Every stage also learns from scenes with boards (docs/storyworld.md), and the stage `looking` comes
    before `unet`. `train storyworld-boards` has it, and sizes to match."""
    pixel_weight: Annotated[float, FACTOR] = 0.0
    """Vision tower: weight of linear probes that have to tell the pixels of each fine cell."""
    looking_weight: Annotated[float, FACTOR] = 1.0
    """Stage `looking`: weight of a loss that says where to look; 0 leaves it to the denoising loss alone."""
    detail_weight: Annotated[float, FACTOR] = 4.0
    """VAE and U-Net: extra weight beside edges."""
    badge_weight: Annotated[float, FACTOR] = 20.0
    """U-Net: extra weight of badges."""
    synchronizer_learning_rate: Annotated[float, RATE] = 1e-3
    """Highest learning rate of the language model's synchronizers."""
    kl_weight: Annotated[float, FACTOR] = 1e-5
    """VAE: weight of the KL term."""
    batch_size: Annotated[int, SIZE] = 16
    """Images a step in the VAE stage."""
    vision_batch_size: Annotated[int, SIZE] = 48
    """Images a step in the vision stage."""
    image_batch_size: Annotated[int, SIZE] = 32
    """Images a step in the U-Net stage and the image stage."""
    sizes: SizesConfig = field(default_factory=SizesConfig)
    vae: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=2450, learning_rate=1e-3, warmup_steps=50, ema_decay=0.995, use_bfloat16=None
        )
    )
    """First stage: pixels to latents and back."""
    vision: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=700, learning_rate=3e-3, optimizer="muon", ema_decay=0.99, use_bfloat16=None
        )
    )
    """Second stage: the vision tower learns to recognise what images show."""
    text: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=6000, learning_rate=2.5e-3, optimizer="muon", ema_decay=0.99, use_bfloat16=None
        )
    )
    """Third stage: the language model learns to read images and to write."""
    looking: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=1500, learning_rate=1e-3, ema_decay=0.998, decay_fraction=0.0, use_bfloat16=None
        )
    )
    """Only with boards, before the fourth: the U-Net learns to look at earlier images, from embeddings that
    never hold what only images show."""
    unet: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=4500,
            learning_rate=1e-3,
            ema_decay=0.998,
            decay_fraction=0.0,
            use_bfloat16=None,
        )
    )
    """Fourth stage: the U-Net learns to generate images from attribute embeddings, without language model."""
    image: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=400, learning_rate=4e-4, ema_decay=0.99, decay_fraction=0.6, use_bfloat16=None
        )
    )
    """Fifth stage: it learns to generate images from documents, and to keep what earlier ones show."""

    def __post_init__(self) -> None:
        check_ranges(self)


def with_boards() -> StoryWorldConfig:
    """The recipe `storyworld-boards`, that of the next version: what it was tried by stands in LOG.md."""
    config = StoryWorldConfig()
    return replace(
        config,
        boards=True,
        pixel_weight=1.0,
        sizes=replace(
            config.sizes,
            latent_channels=8,
            pixel_levels=2,
            image_levels=(0, 1, 2),
            image_heads=8,
            image_points=8,
        ),
        vae=replace(config.vae, steps=4000),
        vision=replace(config.vision, steps=1200),
    )
