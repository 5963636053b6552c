"""A whole model of a few ten thousand parameters: every part real, nothing mocked."""

from copy import deepcopy

import torch
from transformers import PreTrainedTokenizerFast

from mm_interleaved.models.config import (
    AdapterConfig,
    MMInterleavedConfig,
    ResamplerConfig,
    SynchronizerConfig,
)
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.processor import MMInterleavedProcessor

BOS, EOS, PAD = 0, 1, 2


def tiny_config(vocab_size: int = 300, **changes) -> MMInterleavedConfig:
    """Images of 32 px, latents of 8 × 8, pyramid of 16, 8, 4, 2 cells; the last two ids are the image
    tokens.
    """
    settings = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 192,
            "pad_token_id": PAD,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "adapter": AdapterConfig(stem_dim=4),
        "slot_resampler": ResamplerConfig(
            dim=16, num_queries=3, num_layers=2, num_heads=2, mlp_dim=24, query_key_norm=True
        ),
        "conditioning_resampler": ResamplerConfig(
            dim=16, num_queries=4, num_layers=1, num_heads=2, mlp_dim=24
        ),
        "text_synchronizer": SynchronizerConfig(
            value_dim=8,
            levels=(0, 1, 2),
            num_heads=2,
            num_points=2,
            max_images=12,
            base_size=4,
            offset_spread=2.0,
            every=2,
        ),
        "image_synchronizer": SynchronizerConfig(
            value_dim=8,
            levels=(0, 1, 2, 3),
            num_heads=2,
            num_points=2,
            max_images=6,
            base_size=8,
            offset_spread=1.0,
        ),
        "unet_config": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 8, 16, 16],
            "layers_per_block": 2,
            "attention_head_dim": [1, 1, 2, 2],
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            "use_linear_projection": True,
        },
        "vae_config": {
            "latent_channels": 4,
            "block_out_channels": [4, 8, 8],
            "norm_num_groups": 4,
            "sample_size": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "scheduler_config": {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "image_start_token_id": vocab_size - 2,
        "image_token_id": vocab_size - 1,
    }
    return MMInterleavedConfig(**(settings | changes))


def tiny_model(seed: int = 0, *, vocab_size: int = 300, **changes) -> MMInterleavedForConditionalGeneration:
    """A model in which every parameter matters: what starts at zero gets random values too.

    Each is built once a process and copied from then on, which takes a third of the time; torch's random
    numbers go on as after building.
    """
    key = repr((seed, vocab_size, sorted(changes.items())))
    if key not in _BUILT:
        _BUILT[key] = _build(seed, vocab_size, changes), torch.get_rng_state()
    model, random_state = _BUILT[key]
    torch.set_rng_state(random_state)
    return deepcopy(model)


_BUILT: dict[str, tuple[MMInterleavedForConditionalGeneration, torch.Tensor]] = {}


def _build(seed: int, vocab_size: int, changes: dict) -> MMInterleavedForConditionalGeneration:
    torch.manual_seed(seed)
    model = MMInterleavedForConditionalGeneration(tiny_config(vocab_size, **changes)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        # The released start never says a new token; a random model shall.
        model.text_head.base.bias.zero_()
        model.text_head.new.bias.zero_()
    return model


def image_ids(config: MMInterleavedConfig) -> list[int]:
    """The ids of one image: start and slots."""
    return [config.image_start_token_id] + [config.image_token_id] * config.num_slots


def tiny_processor(config: MMInterleavedConfig | None = None) -> MMInterleavedProcessor:
    """The processor that belongs to `tiny_model`: a token a byte, so that any text is short to write down in
    ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = config or tiny_config()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {byte: 3 + i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return MMInterleavedProcessor(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ),
        image_size=32,
        target_size=32,
        num_slots=config.num_slots,
        special_ids={
            "image_start": config.image_start_token_id,
            "image": config.image_token_id,
            "bos": BOS,
            "eos": EOS,
            "pad": PAD,
        },
    )
