"""How a twin of the ablation is built out of a finished model."""

from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch

from mm_interleaved.models.config import MMInterleavedConfig, SynchronizerConfig
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.storyworld.initialisation import open_to_images, open_to_learning
from studies.ablation.settings import TwinSizes
from studies.ablation.variants import Painter, Reader


def twin_config(
    finished: MMInterleavedConfig, sizes: TwinSizes, reader: Reader, painter: Painter
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
    config.slot_resampler = {**config.slot_resampler, "num_queries": reader.num_slots}
    shape: dict[str, Any] = {"num_heads": 4, "num_points": 4, "value_dim": 96}
    config.text_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=reader.levels, max_images=16, base_size=8, offset_spread=3.0, every=2
        )
    ) if reader.levels else None  # fmt: skip
    config.image_synchronizer = asdict(
        SynchronizerConfig(
            **shape, levels=painter.levels, max_images=sizes.max_context_images + 1, base_size=16,
            offset_spread=4.0,
        )
    ) if painter.levels else None  # fmt: skip
    config.context_images = painter.context_images
    return config


def build_twin(
    finished: MMInterleavedForConditionalGeneration, sizes: TwinSizes, reader: Reader, painter: Painter
) -> MMInterleavedForConditionalGeneration:
    """A twin whose eyes, U-Net and VAE are the finished model's; slots, language model and synchronizers
    are new, by the reader's seed.
    """
    torch.manual_seed(reader.seed)
    config: Any = finished.config
    model = MMInterleavedForConditionalGeneration(twin_config(config, sizes, reader, painter))
    open_to_images(model)
    open_to_learning(model)
    kept = ("vision.", "image_decoder.unet.", "image_decoder.vae.", "image_decoder.negative_conditioning")
    made_anew = ("vision.resampler.", "vision.slot_projection.")
    weights = {
        name: tensor
        for name, tensor in finished.state_dict().items()
        if name.startswith(kept) and not name.startswith(made_anew)
    }
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"a twin lacks {unknown[:3]}"
    return model.train()
