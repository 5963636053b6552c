"""A small image decoder out of the real parts, and the pyramids that it may look at.

Letters: I images, C feature channels, N attributes, R conditioning vectors.
"""

from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.models.adapter import pixel_projections
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.models.resampler import Resampler
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import MapSynchronizer, UNetSynchronizers, skip_channels
from mm_interleaved.models.vision import VisionTower
from mm_interleaved.recipes.storyworld.vision_stage import VisionStage
from studies.image_detail.scenes import CODE_VALUES, LATENT_SIZE, latents_of
from studies.image_detail.settings import TrialSettings

CHANNELS = (32, 48, 64)
CODE_DIM = 48
FEATURE_DIM = 48
_TOWER_BATCH, _TOWER_RATE = 16, 1e-3


class Code(nn.Module):
    """Labels as conditioning vectors, each attribute half a vector: fixed random ones, as in the recipe."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        half = CODE_DIM // 2
        tables = [
            F.layer_norm(torch.randn(size + 1, half, generator=generator), (half,)) for size in CODE_VALUES
        ]
        self.register_buffer("table", torch.cat(tables))
        sizes = torch.tensor([len(table) for table in tables])
        self.register_buffer("start", sizes.cumsum(0) - sizes)

    def forward(self, labels_IN: Tensor) -> Tensor:
        """(I, R, CODE_DIM)."""
        row_IN = torch.where(labels_IN < 0, 0, labels_IN + 1) + cast(Tensor, self.start)
        return cast(Tensor, self.table)[row_IN].view(len(labels_IN), -1, CODE_DIM)


class EncoderPyramid(nn.Module):
    """Three levels of a small convolutional encoder: 32, 16 and 8 cells."""

    level_sizes = (32, 16, 8)
    dim = FEATURE_DIM

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, FEATURE_DIM, 4, 2, 1), nn.SiLU(), nn.Conv2d(FEATURE_DIM, FEATURE_DIM, 1)
        )
        self.middle = nn.Conv2d(FEATURE_DIM, FEATURE_DIM, 4, 2, 1)
        self.coarse = nn.Conv2d(FEATURE_DIM, FEATURE_DIM, 4, 2, 1)

    def forward(self, pixels_I3HW: Tensor) -> list[Tensor]:
        fine = self.fine(2 * pixels_I3HW - 1)
        middle = self.middle(F.silu(fine))
        return [fine, middle, self.coarse(F.silu(middle))]


class LatentPyramid(nn.Module):
    """The latents themselves through one linear layer, and their means of two by two cells."""

    level_sizes = (16, 8)
    dim = FEATURE_DIM

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, FEATURE_DIM, 1)

    def forward(self, pixels_I3HW: Tensor) -> list[Tensor]:
        latents = latents_of(pixels_I3HW)
        return [self.projection(latents), self.projection(F.avg_pool2d(latents, 2))]


class TowerPyramid(nn.Module):
    """Levels of the shipped vision tower, which is frozen.

    Args:
        fine: with the level of 32 cells.
        steps: for so many it first learns on, on images with boards, with a loss of pixels.
        pixel_levels: see `VisionAdapter`; the projections are new.
        seed: of these images.
    """

    def __init__(self, *, fine: bool, steps: int, pixel_levels: int, seed: int) -> None:
        super().__init__()
        from mm_interleaved.checkpoint.load import load_model
        from mm_interleaved.model_files.resolve import find_model

        self.tower = load_model(find_model("storyworld"), dtype="float32").vision
        self.tower.adapter.pixel_projections = pixel_projections(96, pixel_levels)
        if steps:
            _teach_pixels(self.tower, steps, seed)
        self.tower.requires_grad_(False).eval()
        self.levels = (0, 1, 2) if fine else (1, 2)
        self.level_sizes = tuple(32 >> level for level in self.levels)
        self.dim = 96

    @torch.no_grad()
    def forward(self, pixels_I3HW: Tensor) -> list[Tensor]:
        pyramid = self.tower(pixels_I3HW).pyramid
        return [pyramid[level].float() for level in self.levels]


def _teach_pixels(tower: VisionTower, steps: int, seed: int) -> None:
    """The recipe's vision stage with boards, by AdamW alone."""
    stage = VisionStage(
        tower.requires_grad_(True).train(), seed=seed, batch_size=_TOWER_BATCH, boards=True, pixel_weight=1.0
    )
    parameters = [p for part in stage.trained_parts().values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _TOWER_RATE * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        stage.compute_losses(stage.make_batch(step)).total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def build_pyramid(settings: TrialSettings) -> Any:
    """A module: images (I, 3, 64, 64) in [0, 1] to maps, with `level_sizes` and `dim`."""
    if settings.pyramid == "encoder":
        return EncoderPyramid()
    if settings.pyramid == "latents":
        return LatentPyramid()
    return TowerPyramid(
        fine=settings.pyramid == "tower-fine",
        steps=settings.tower_steps,
        pixel_levels=settings.pixel_levels,
        seed=settings.seed,
    )


def build_decoder(settings: TrialSettings, pyramid: Any) -> ImageDecoder:
    """U-Net and synchronizers; its autoencoder is never asked, see `scenes.latents_of`."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=cast(Any, CHANNELS),
        layers_per_block=1,
        cross_attention_dim=CODE_DIM,
        attention_head_dim=4,
        # Attention of pixels to each other is two thirds of a step here, and convolutions do for 16 cells.
        only_cross_attention=True,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    synchronizers = None
    if settings.looks:
        skips = skip_channels(unet)
        maps = [*skips, skips[-1]]
        built = [_map_synchronizer(channels, depth, settings, pyramid) for channels, depth in maps]
        synchronizers = UNetSynchronizers(built[:-1], built[-1])
    resampler = Resampler(
        CODE_DIM, CODE_DIM, num_queries=len(CODE_VALUES) // 2, num_layers=1, num_heads=4, mlp_dim=48
    )
    vae = AutoencoderKL(block_out_channels=cast(Any, (8,)), norm_num_groups=8)
    return ImageDecoder(resampler, unet, vae, synchronizers)


def _map_synchronizer(channels: int, depth: int, settings: TrialSettings, pyramid: Any) -> MapSynchronizer:
    synchronizer = FeatureSynchronizer(
        channels,
        pyramid.dim,
        value_dim=FEATURE_DIM,
        num_heads=settings.heads,
        num_levels=len(pyramid.level_sizes),
        num_points=settings.points,
        max_images=3,
        # In cells of the map itself, as in the full model.
        base_size=LATENT_SIZE / 2**depth,
        offset_spread=settings.spread,
    )
    built = MapSynchronizer(synchronizer, channels, pyramid.dim, grid_size=LATENT_SIZE)
    if settings.opening:
        nn.init.normal_(built.conv.weight, std=settings.opening * channels**-0.5)
    return built
