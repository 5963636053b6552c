"""The released model's numbers as one of our configurations.

What the official code takes from component folders (language model, CLIP, Stable Diffusion) is passed in;
what it hard-codes stands here (reference: `mm_interleaved` release of 2024, commit ac539d0).
"""

from collections.abc import Mapping
from typing import Any

from mm_interleaved.models.config import (
    AdapterConfig,
    MMInterleavedConfig,
    ResamplerConfig,
    SynchronizerConfig,
)

_LEVELS_BY_SIZE = {64: 0, 32: 1, 16: 2, 8: 3}
# The library default that both Q-Formers inherit, whatever their width.
_QFORMER_MLP_DIM = 3072
_BLOCKS = 4

# The full-size model: Vicuna 13B v1.3, CLIP ViT-L/14, Stable Diffusion 2.1 base, and the arguments of its
# YAML file.
RELEASED: dict[str, dict[str, Any]] = {
    "llm": {
        "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    },
    "clip": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
        "use_linear_projection": True, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu",
        "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "sample_size": 768, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
        "act_fn": "silu", "scaling_factor": 0.18215, "down_block_types": ["DownEncoderBlock2D"] * _BLOCKS,
        "up_block_types": ["UpDecoderBlock2D"] * _BLOCKS,
    },
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    },
    "model": {
        "num_img_token": 64, "seq_len": 2048, "txt_vocab_size": 32002, "image_embed_dim": 1024,
        "cross_attention_frequency": 4, "spatial_shapes": [32, 16, 8], "loss_img_weight": 10.0,
        "loss_txt_weight": 1.0,
        "special_token_dict": {
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 31999, "soi_token_id": 32000,
            "image_token_id": 32001,
        },
        "visual_tokenizer_config": {
            "perceiver_config": {
                "num_queries": 64, "hidden_size": 768, "encoder_hidden_size": 1024,
                "cross_attention_frequency": 2, "num_hidden_layers": 12, "num_attention_heads": 12,
                "qk_normalization": True,
            },
        },
        "image_decoder_config": {
            "image_size": 512, "seq_len": 77, "uncond_prob": 0.1,
            "perceiver_config": {
                "num_queries": 77, "hidden_size": 1024, "encoder_hidden_size": 5120,
                "cross_attention_frequency": 1, "num_hidden_layers": 1, "num_attention_heads": 16,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
    },
}  # fmt: skip


def released_config(
    *,
    llm: Mapping[str, Any],
    clip: Mapping[str, Any],
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    model: Mapping[str, Any],
) -> MMInterleavedConfig:
    """Our configuration of an official model.

    Args:
        llm, clip, unet, vae, scheduler: configurations of the parts in transformers' and diffusers' terms.
        model: arguments of the official model class.
    """
    tokens = model["special_token_dict"]
    image_decoder = model["image_decoder_config"]
    image_size = image_decoder["image_size"]
    unet_classes = {k: v for k, v in unet.items() if not k.startswith("_")}
    return MMInterleavedConfig(
        text_config={
            "model_type": "llama",
            **{k: v for k, v in llm.items() if k != "model_type"},
            "vocab_size": model["txt_vocab_size"],
            "pad_token_id": tokens["pad_token_id"],
        },
        vision_config=dict(clip),
        adapter=AdapterConfig(),
        slot_resampler=_resampler(
            model["visual_tokenizer_config"]["perceiver_config"], model["num_img_token"], dropout=0.1
        ),
        text_synchronizer=SynchronizerConfig(
            # A fifth of the released language model's width, which is CLIP's width at every size.
            value_dim=model["image_embed_dim"],
            levels=tuple(_LEVELS_BY_SIZE[size] for size in model["spatial_shapes"]),
            max_images=50,
            base_size=16,
            offset_spread=3.0,
            every=model["cross_attention_frequency"],
        ),
        unet_config=unet_classes,
        vae_config={k: v for k, v in vae.items() if not k.startswith("_")},
        scheduler_config=_ddpm(scheduler),
        conditioning_resampler=_resampler(
            image_decoder["perceiver_config"], image_decoder["seq_len"], dropout=0.0
        ),
        image_synchronizer=SynchronizerConfig(
            value_dim=1024,
            levels=(0, 1, 2, 3),
            max_images=10,
            base_size=64 // (512 // image_size),
            offset_spread=1.0,
        ),
        bos_token_id=tokens["bos_token_id"],
        eos_token_id=tokens["eos_token_id"],
        pad_token_id=tokens["pad_token_id"],
        image_start_token_id=tokens["soi_token_id"],
        image_token_id=tokens["image_token_id"],
        num_new_tokens=model["txt_vocab_size"] - llm["vocab_size"],
        text_loss_weight=model.get("loss_txt_weight", 1.0),
        image_loss_weight=model.get("loss_img_weight", 10.0),
        condition_dropout=image_decoder.get("uncond_prob", 0.1),
        context_images="previous",
        compat="released",
    )


def _resampler(perceiver: Mapping[str, Any], num_queries: int, *, dropout: float) -> ResamplerConfig:
    return ResamplerConfig(
        dim=perceiver["hidden_size"],
        num_queries=num_queries,
        num_layers=perceiver["num_hidden_layers"],
        num_heads=perceiver["num_attention_heads"],
        mlp_dim=perceiver.get("intermediate_size", _QFORMER_MLP_DIM),
        cross_attention_every=perceiver["cross_attention_frequency"],
        query_key_norm=perceiver.get("qk_normalization", False),
        dropout=perceiver.get("hidden_dropout_prob", dropout),
    )


def _ddpm(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The released scheduler file describes a PNDM sampler; the official code reads it as ancestral DDPM."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type",
    "clip_sample",
             "steps_offset", "set_alpha_to_one")  # fmt: skip
    return {
        **{name: scheduler[name] for name in names if name in scheduler},
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
    }


def official_settings(config: MMInterleavedConfig) -> dict[str, dict[str, Any]]:
    """A configuration in the terms of `released_config`, which makes the same one of them again."""
    text, synchronizer = config.text_config, config.part("text_synchronizer")
    sizes_by_level = {level: size for size, level in _LEVELS_BY_SIZE.items()}
    slots, conditioning = config.part("slot_resampler"), config.part("conditioning_resampler")
    return {
        "llm": {**text.to_diff_dict(), "vocab_size": text.vocab_size - config.num_new_tokens},
        "clip": config.vision_config.to_diff_dict(),
        "unet": dict(config.unet_config),
        "vae": dict(config.vae_config),
        "scheduler": dict(config.scheduler_config),
        "model": {
            "num_img_token": config.num_slots,
            "txt_vocab_size": text.vocab_size,
            "image_embed_dim": synchronizer.value_dim,
            "cross_attention_frequency": synchronizer.every,
            "spatial_shapes": [sizes_by_level[level] for level in synchronizer.levels],
            "loss_img_weight": config.image_loss_weight,
            "loss_txt_weight": config.text_loss_weight,
            "special_token_dict": {
                "bos_token_id": config.bos_token_id,
                "eos_token_id": config.eos_token_id,
                "pad_token_id": config.pad_token_id,
                "soi_token_id": config.image_start_token_id,
                "image_token_id": config.image_token_id,
            },
            "visual_tokenizer_config": {"perceiver_config": _perceiver(slots)},
            "image_decoder_config": {
                # The official code knows 512 pixels and their halves; its position grid follows from them.
                "image_size": 512 // (64 // config.part("image_synchronizer").base_size),
                "seq_len": conditioning.num_queries,
                "uncond_prob": config.condition_dropout,
                "perceiver_config": _perceiver(conditioning),
            },
        },
    }


def _perceiver(resampler: ResamplerConfig) -> dict[str, Any]:
    return {
        "num_queries": resampler.num_queries,
        "hidden_size": resampler.dim,
        "num_hidden_layers": resampler.num_layers,
        "num_attention_heads": resampler.num_heads,
        "intermediate_size": resampler.mlp_dim,
        "cross_attention_frequency": resampler.cross_attention_every,
        "qk_normalization": resampler.query_key_norm,
        "hidden_dropout_prob": resampler.dropout,
    }
