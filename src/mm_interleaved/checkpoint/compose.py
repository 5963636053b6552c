"""A new, untrained model out of pretrained parts: a language model, CLIP, a Stable Diffusion of generation 1
or 2.

The parts keep their weights and, with all gates closed, their behaviour; what is between them starts fresh.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mm_interleaved.checkpoint.load import DTYPES, model_file_errors
from mm_interleaved.errors import ModelFileError, StorageError, UsageError, escape
from mm_interleaved.files import new_folder
from mm_interleaved.models.config import (
    AdapterConfig,
    MMInterleavedConfig,
    ResamplerConfig,
    SynchronizerConfig,
)
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.language import language_family
from mm_interleaved.models.unet import check_unet
from mm_interleaved.spelling import hint
from mm_interleaved.tokens.processor import MMInterleavedProcessor

logger = logging.getLogger(__name__)

# Of a scheduler's file, what says how images are noised; how they are sampled is chosen at generation.
_NOISE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                   "prediction_type", "clip_sample", "steps_offset", "timestep_spacing",
                   "rescale_betas_zero_snr")  # fmt: skip
_CONDITIONING_VECTORS = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSettings:
    """Sizes of what stands between the parts; None: the paper's, fitted to the parts' widths."""

    num_slots: int = 64
    """Tokens an image takes in the language model."""
    adapter: AdapterConfig | None = None
    slot_resampler: ResamplerConfig | None = None
    conditioning_resampler: ResamplerConfig | None = None
    text_synchronizer: SynchronizerConfig | None = None
    image_synchronizer: SynchronizerConfig | None = None


def compose(
    out: Path,
    *,
    llm: str,
    vision: str,
    diffusion: str,
    num_slots: int = 64,
    dtype: str | None = None,
    seed: int = 0,
    joints: JointSettings | None = None,
) -> MMInterleavedForConditionalGeneration:
    """Write a model out of pretrained parts, each a local folder or a hub id, and return it.

    Needs memory for the whole model and once more for its largest part.

    Args:
        out: a new or empty folder; it is whole or not there.
        num_slots: tokens an image takes, unless `joints` says.
        dtype: "float32", "bfloat16" or "float16"; default: as the language model is saved.
        seed: of the new parts' first weights.
        joints: sizes of the new parts.

    Raises:
        ModelFileError: a part is missing, damaged, or does not fit, in one sentence.
        StorageError: the disk failed or is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype: found {escape(dtype)!r}, {hint(dtype, DTYPES)}", field="dtype")
    joints = joints or JointSettings(num_slots=num_slots)

    # 1. What the parts are, and whether they fit: only small files are read.
    with _part_errors("llm", llm):
        text = AutoConfig.from_pretrained(llm)
        language_family(text.model_type)
        tokenizer = AutoTokenizer.from_pretrained(llm)
    tokens = _special_tokens(text, tokenizer, llm)
    vision_config = _vision_config(vision)
    with _part_errors("diffusion", diffusion):
        unet_config = _diffusers_config(UNet2DConditionModel, diffusion, "unet")
        vae_config = _diffusers_config(AutoencoderKL, diffusion, "vae")
        noise = _diffusers_config(DDPMScheduler, diffusion, "scheduler")
    config = _config(text, vision_config, unet_config, vae_config, noise, tokens, joints)

    # 2. The whole with fresh weights, then the parts' own over them.
    kind = DTYPES[dtype] if dtype else (text.dtype or torch.float32)
    with model_file_errors("parts that do not fit each other"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MMInterleavedForConditionalGeneration._from_config(config, dtype=kind)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        _take_language_model(model, llm, tokens.copied)
        _take_clip(model, vision)
        _take_diffusion(model, diffusion)

    # 3. Out.
    processor = MMInterleavedProcessor(
        tokenizer,
        config.vision_config.image_size,
        config.unet_config["sample_size"] * model.image_decoder.latent_factor,
        config.num_slots,
        special_ids=tokens.ids,
    )
    with new_folder(Path(out)) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise StorageError(f"{out}: cannot be written ({error})") from error
        processor.save_pretrained(folder)
    return model.eval()


@dataclass(frozen=True, slots=True)
class _SpecialTokens:
    """Ids by name, and how many of them stand behind the language model's own vocabulary."""

    ids: dict[str, int]
    num_new: int
    copied: dict[int, int]
    """New ids whose embeddings start as those of old ones."""


def _special_tokens(text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, llm: str) -> _SpecialTokens:
    """Image start and image behind the vocabulary; so are a beginning and a padding of their own, where the
    language model has none (Qwen), since a document's beginning, its end and padding must be told apart."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelFileError(f"llm {escape(llm)}: its tokenizer has no end-of-text token, expected one")
    first = text.vocab_size
    # Ids of a tokenizer are typed as anything that a token may be.
    ids: dict[str, Any] = {"image_start": first, "image": first + 1, "eos": eos}
    copied: dict[int, Any] = {}
    for name, found in (("bos", tokenizer.bos_token_id), ("pad", tokenizer.pad_token_id)):
        if found is None or found in ids.values():
            found = first + 2 + len(copied)
            copied[found] = eos
        ids[name] = found
    return _SpecialTokens(ids, 2 + len(copied), copied)


def _vision_config(vision: str) -> dict[str, Any]:
    with _part_errors("vision", vision):
        found = AutoConfig.from_pretrained(vision)
        if found.model_type not in ("clip", "clip_vision_model"):
            raise ModelFileError(f"vision {escape(vision)}: is of type {found.model_type!r}, expected CLIP")
        config = getattr(found, "vision_config", found)
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            raise ModelFileError(
                f"vision {escape(vision)}: images of {config.image_size} in patches of {config.patch_size}, "
                "expected a square grid"
            )
        return config.to_dict()


def _config(
    text: PreTrainedConfig,
    vision: dict[str, Any],
    unet: dict[str, Any],
    vae: dict[str, Any],
    noise: dict[str, Any],
    tokens: _SpecialTokens,
    joints: JointSettings,
) -> MMInterleavedConfig:
    """The whole model's numbers: the parts' own, and the paper's for what is between them."""
    width, conditioning_dim = vision["hidden_size"], unet["cross_attention_dim"]
    if not isinstance(conditioning_dim, int):
        raise ModelFileError(
            "diffusion: does not have the shape of SD 1.x/2.x: expected one cross_attention_dim, "
            f"found {conditioning_dim}"
        )
    text_settings = {
        **text.to_dict(),
        "vocab_size": text.vocab_size + tokens.num_new,
        "pad_token_id": tokens.ids["pad"],
        # The head is a layer of its own here, also where the language model shares it with its embeddings.
        "tie_word_embeddings": False,
    }
    with model_file_errors("parts that do not fit each other"):
        return MMInterleavedConfig(
            text_config=text_settings,
            vision_config=vision,
            unet_config=_plain(unet),
            vae_config=_plain(vae),
            scheduler_config={name: noise[name] for name in _NOISE_SETTINGS if name in noise},
            adapter=joints.adapter or AdapterConfig(),
            slot_resampler=joints.slot_resampler
            or ResamplerConfig(
                dim=768,
                num_queries=joints.num_slots,
                num_layers=12,
                num_heads=12,
                cross_attention_every=2,
                query_key_norm=True,
                dropout=0.1,
            ),
            conditioning_resampler=joints.conditioning_resampler
            or ResamplerConfig(
                dim=conditioning_dim,
                num_queries=_CONDITIONING_VECTORS,
                num_layers=1,
                num_heads=max(1, conditioning_dim // 64),
            ),
            text_synchronizer=joints.text_synchronizer
            or SynchronizerConfig(
                value_dim=width,
                levels=(1, 2, 3),
                max_images=50,
                base_size=vision["image_size"] // vision["patch_size"],
                offset_spread=3.0,
                every=4,
            ),
            image_synchronizer=joints.image_synchronizer
            or SynchronizerConfig(
                value_dim=1024,
                levels=(0, 1, 2, 3),
                max_images=10,
                base_size=unet["sample_size"],
                offset_spread=1.0,
            ),
            bos_token_id=tokens.ids["bos"],
            eos_token_id=tokens.ids["eos"],
            pad_token_id=tokens.ids["pad"],
            image_start_token_id=tokens.ids["image_start"],
            image_token_id=tokens.ids["image"],
            num_new_tokens=tokens.num_new,
            context_images="all",
        )


def _take_language_model(
    model: MMInterleavedForConditionalGeneration, llm: str, copied: Mapping[int, int]
) -> None:
    """Layers, embeddings and head; rows of the new tokens stay fresh, or copy old ones."""
    with _part_errors("llm", llm):
        stock = AutoModelForCausalLM.from_pretrained(llm, dtype=model.dtype)
    state = stock.model.state_dict()
    embeddings = state.pop("embed_tokens.weight")
    result = model.language_model.load_state_dict(state, strict=False)
    ours = [
        name for name in result.missing_keys if ".synchronizer." not in name and name != "embed_tokens.weight"
    ]
    if result.unexpected_keys or ours:
        raise ModelFileError(
            f"llm {escape(llm)}: {result.unexpected_keys or ours} do not fit its family's layers"
        )
    old, num_new = len(embeddings), model.config.num_new_tokens
    table = model.language_model.embed_tokens.weight
    table[:old] = embeddings
    # Fresh rows as spread as the old ones; they are frozen in the released recipe.
    table[old:] = embeddings.float().std() * torch.randn(
        table[old:].shape, generator=torch.Generator().manual_seed(old)
    )
    for new_id, old_id in copied.items():
        table[new_id] = table[old_id]

    head, base = stock.get_output_embeddings(), model.text_head.base
    base.weight[:-num_new] = head.weight
    base.bias[:-num_new] = 0 if head.bias is None else head.bias


def _take_clip(model: MMInterleavedForConditionalGeneration, vision: str) -> None:
    with _part_errors("vision", vision):
        # A folder holds either CLIP as a whole or its vision side.
        is_whole = AutoConfig.from_pretrained(vision).model_type == "clip"
        stock = (CLIPModel if is_whole else CLIPVisionModel).from_pretrained(vision, dtype=model.dtype)
    stock: Any = getattr(stock, "vision_model", stock)
    clip = model.vision.clip
    _copy(stock.embeddings, clip.embeddings)
    _copy(stock.pre_layrnorm, clip.pre_norm)
    _copy(stock.encoder.layers, clip.layers)


def _take_diffusion(model: MMInterleavedForConditionalGeneration, diffusion: str) -> None:
    decoder = model.image_decoder
    with _part_errors("diffusion", diffusion):
        unet = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet", torch_dtype=model.dtype)
        vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae", torch_dtype=model.dtype)
    check_unet(unet)
    _copy(unet, decoder.unet)
    _copy(vae, decoder.vae)
    empty = _empty_prompt(diffusion)
    if empty is None or empty.shape != decoder.negative_conditioning.shape:
        found = "no text encoder" if empty is None else f"a text encoder that gives {tuple(empty.shape)}"
        logger.warning("diffusion %s: %s, so the negative conditioning starts at zero", diffusion, found)
    else:
        decoder.negative_conditioning.copy_(empty)


def _empty_prompt(diffusion: str) -> Tensor | None:
    """What the text encoder makes of the empty string, (1, R, D); None if the pipeline brings none."""
    try:
        encoder = CLIPTextModel.from_pretrained(diffusion, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(diffusion, subfolder="tokenizer")
    except (OSError, ValueError):
        return None
    ids = tokenizer(
        "",
        padding="max_length",
        max_length=encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(ids).last_hidden_state


def _copy(stock: nn.Module, ours: nn.Module) -> None:
    ours.load_state_dict(stock.state_dict(), strict=True)


def _diffusers_config(kind: Any, diffusion: str, subfolder: str) -> dict[str, Any]:
    return dict(kind.load_config(diffusion, subfolder=subfolder))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _part_errors(part: str, name: str):
    return model_file_errors(f"{part} {escape(name)}")
