"""The released model's numbers as one of our configurations.

What the official code takes from component folders (language model, CLIP, Stable Diffusion) is passed in; what it
hard-codes stands here (reference: `mm_interleaved` release of 2024, commit ac539d0).
"""

from collections.abc import Mapping
from typing import Any

from mm_interleaved.config import AdapterConfig, MMInterleavedConfig, ResamplerConfig, SynchronizerConfig

_LEVELS_BY_SIZE = {64: 0, 32: 1, 16: 2, 8: 3}
# The library default that both Q-Formers inherit, whatever their width.
_QFORMER_MLP_DIM = 3072


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
        conditioning_resampler=_resampler(image_decoder["perceiver_config"], image_decoder["seq_len"], dropout=0.0),
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
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "clip_sample",
             "steps_offset", "set_alpha_to_one")  # fmt: skip
    return {
        **{name: scheduler[name] for name in names if name in scheduler},
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
    }
