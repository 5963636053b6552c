"""Whole models of chosen sizes with random weights: a model of text, and an image decoder."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import initialization as init

from benchmarks.sizes import UNET_LEVELS, SynchronizerSize, feature_synchronizer, fill_parameters
from mm_interleaved.models.config import (
    AdapterConfig,
    MMInterleavedConfig,
    ResamplerConfig,
    SynchronizerConfig,
)
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.resampler import Resampler
from mm_interleaved.models.unet import MapSynchronizer, UNetSynchronizers, skip_channels

BOS, IMAGE_START, IMAGE = 1, 998, 999
VOCABULARY = 1000
SLOTS = 64
"""Tokens of an image, as published."""
IMAGE_SIZE = 112
"""Pixels; with patches of 14 the levels have the published 32, 16 and 8 cells."""


def writer_config(
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    heads: int,
    value_dim: int = 512,
    vision_dim: int = 256,
    vocabulary: int = VOCABULARY,
) -> MMInterleavedConfig:
    """A model that reads and writes; every fourth layer attends to images, as published."""
    return MMInterleavedConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "hidden_size": vision_dim,
            "intermediate_size": 4 * vision_dim,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
        },
        adapter=AdapterConfig(stem_dim=16),
        slot_resampler=ResamplerConfig(
            dim=vision_dim, num_queries=SLOTS, num_layers=2, num_heads=4, mlp_dim=512, query_key_norm=True
        ),
        text_synchronizer=SynchronizerConfig(
            value_dim=value_dim,
            levels=(0, 1, 2),
            num_heads=16 if value_dim % 256 == 0 else 8,
            max_images=50,
            base_size=16,
            offset_spread=3.0,
            every=4,
        ),
        bos_token_id=BOS,
        image_start_token_id=vocabulary - 2,
        image_token_id=vocabulary - 1,
    )


def random_model(
    config: MMInterleavedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> MMInterleavedForConditionalGeneration:
    """A model in evaluation mode, all of whose parameters are random."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Drawn below, and not twice before that: at published sizes that alone would take a minute.
        with init.no_init_weights(), torch.device(device):
            model = MMInterleavedForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(former)
    fill_parameters(model, device, seed)
    return model.eval()


def random_image_decoder(
    channels: tuple[int, ...],
    sample_size: int,
    value_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ImageDecoder, tuple[SynchronizerSize, ...]]:
    """An image decoder of the shape of Stable Diffusion 2.1, and the sizes of its synchronizers, the middle
    last.

    Features and conditioning are as wide as the values.
    """
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**unet_settings(channels, sample_size, value_dim))
    sizes = synchronizer_sizes(unet, sample_size, value_dim)

    def block(size: SynchronizerSize) -> MapSynchronizer:
        return MapSynchronizer(
            feature_synchronizer(size), size.query_dim, size.feature_dim, grid_size=sample_size
        )

    with torch.device("meta"):
        blocks = [block(size) for size in sizes]
        resampler = Resampler(value_dim, 64, num_queries=77, num_layers=1, num_heads=4, mlp_dim=64)
        vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        decoder = ImageDecoder(resampler, unet, vae, UNetSynchronizers(blocks[:-1], blocks[-1]))
    decoder = decoder.to(dtype).to_empty(device=device).eval()
    fill_parameters(decoder, device)
    for module in decoder.modules():
        # What left the meta device holds whatever the memory held.
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
        if isinstance(module, MapSynchronizer):
            module.position_table.copy_(torch.randn_like(module.position_table))
    return decoder, sizes


def unet_settings(channels: tuple[int, ...], sample_size: int, conditioning_dim: int) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`: Stable Diffusion 2.1 with these channels."""
    return {
        "sample_size": sample_size,
        "block_out_channels": channels,
        "cross_attention_dim": conditioning_dim,
        "attention_head_dim": [max(1, width // 64) for width in channels],
        "use_linear_projection": True,
    }


def synchronizer_sizes(unet: nn.Module, sample_size: int, value_dim: int) -> tuple[SynchronizerSize, ...]:
    """Of the synchronizers of all skips and of the middle."""
    skips = skip_channels(unet)
    # The pyramid's finest level has as many cells as the latents, as published.
    levels = tuple(level * sample_size // UNET_LEVELS[0] for level in UNET_LEVELS)
    return tuple(
        SynchronizerSize(
            query_dim=width,
            feature_dim=value_dim,
            value_dim=value_dim,
            num_heads=16,
            num_points=8,
            level_sizes=levels,
            max_images=10,
            base_size=sample_size / 2**depth,
        )
        for width, depth in (*skips, skips[-1])
    )
