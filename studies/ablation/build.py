"""How a variant of the ablation is built out of a finished model."""

from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch

from mm_interleaved.models.config import MMInterleavedConfig, SynchronizerConfig
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.storyworld.initialisation import open_to_images, open_to_learning
from studies.ablation.settings import VariantSizes
from studies.ablation.variants import ImageDecoderVariant, LanguageVariant


def variant_config(
    finished: MMInterleavedConfig,
    sizes: VariantSizes,
    language: LanguageVariant,
    image_decoder: ImageDecoderVariant,
) -> MMInterleavedConfig:
    """The finished model's configuration with another language model, slots and synchronizers."""
    config = deepcopy(finished)
    text = config.text_config
    text.hidden_size, text.intermediate_size = sizes.text_dim, 5 * sizes.text_dim // 2
    text.num_hidden_layers = sizes.text_layers
    text.num_attention_heads = text.num_key_value_heads = sizes.text_heads
    text.head_dim = sizes.text_dim // sizes.text_heads
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:1] * sizes.text_layers
    config.slot_resampler = {**config.slot_resampler, "num_queries": language.num_slots}
    shape: dict[str, Any] = {"num_heads": 4, "num_points": 4, "value_dim": 96}
    config.text_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=language.levels, max_images=16, base_size=8, offset_spread=3.0, every=2
        )
    ) if language.levels else None  # fmt: skip
    config.image_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=image_decoder.levels, max_images=sizes.max_context_images + 1, base_size=16,
            offset_spread=4.0,
        )
    ) if image_decoder.levels else None  # fmt: skip
    config.context_images = image_decoder.context_images
    return config


def build_variant(
    finished: MMInterleavedForConditionalGeneration,
    sizes: VariantSizes,
    language: LanguageVariant,
    image_decoder: ImageDecoderVariant,
) -> MMInterleavedForConditionalGeneration:
    """A variant whose vision tower, U-Net and VAE are the finished model's; slots, language model and
    synchronizers are new, by the language model's seed.
    """
    torch.manual_seed(language.seed)
    config: Any = finished.config
    model = MMInterleavedForConditionalGeneration(variant_config(config, sizes, language, image_decoder))
    open_to_images(model)
    open_to_learning(model)
    for new, old in zip(_kept_parts(model), _kept_parts(finished), strict=True):
        new.load_state_dict(old.state_dict())
    # The tables of the vision tower itself, as the finished model's file rounds them.
    for name, table in finished.vision.named_buffers(recurse=False):
        getattr(model.vision, name).copy_(table)
    decoder = model.image_decoder
    decoder.negative_conditioning.data.copy_(finished.image_decoder.negative_conditioning)
    return model.train()


def _kept_parts(model: MMInterleavedForConditionalGeneration) -> tuple[torch.nn.Module, ...]:
    """What is taken from the finished model: all but slots, language model, synchronizers, conditioning."""
    vision, decoder = model.vision, model.image_decoder
    tokens = (vision.token_projection, vision.token_norm, vision.position_norm)
    return vision.clip, vision.adapter, *tokens, decoder.unet, decoder.vae
