"""Official parameter names and ours, both ways.

Every official key is matched by exactly one rule below; nothing is guessed, so what a rule does not name is
reported by name. `{n}` stands for a number, `{p}` for `weight` or `bias`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_PLACEHOLDERS = {"{n}": r"(\d+)", "{m}": r"(\d+)", "{p}": "(weight|bias)", "{rest}": "(.+)"}

# What the synchronizer's leaves are called.
_SYNCHRONIZER = {
    "dynamic_offset_mask.{p}": "query_projection.{p}",
    "query_relpos.weight": "relative_index_embedding.weight",
    "sampling_offsets.{p}": "sampling_offsets.{p}",
    "attention_weights.{p}": "attention_logits.{p}",
    "value_proj.{p}": "value_projection.{p}",
    "output_proj.{p}": "output_projection.{p}",
    "ignore_token": "ignore_value",
}
_DEFORMABLE_ATTENTION = {
    name: ours
    for name, ours in _SYNCHRONIZER.items()
    if name.split(".")[0] in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
}


def _under(official: str, ours: str, leaves: Mapping[str, str]) -> dict[str, str]:
    return {f"{official}.{name}": f"{ours}.{our_name}" for name, our_name in leaves.items()}


def _same(official: str, ours: str, names: Iterable[str]) -> dict[str, str]:
    return _under(official, ours, {name: name for name in names})


def _resampler_attention() -> dict[str, str]:
    return {
        "attention.query.{p}": "query.{p}",
        "attention.key.{p}": "key.{p}",
        "attention.value.{p}": "value.{p}",
        "attention.q_norm.{p}": "query_norm.{p}",
        "attention.k_norm.{p}": "key_norm.{p}",
        "output.dense.{p}": "output.{p}",
        "output.LayerNorm.{p}": "norm.{p}",
    }


def _resampler(official: str, ours: str) -> dict[str, str]:
    former, layer = f"{official}.blip2qformer", f"{official}.blip2qformer.encoder.layer.{{n}}"
    return {
        f"{official}.queries": f"{ours}.queries",
        f"{former}.layernorm.{{p}}": f"{ours}.query_norm.{{p}}",
        **_under(f"{layer}.attention", f"{ours}.layers.{{n}}.self_attention", _resampler_attention()),
        **_under(f"{layer}.crossattention", f"{ours}.layers.{{n}}.cross_attention", _resampler_attention()),
        f"{layer}.intermediate_query.dense.{{p}}": f"{ours}.layers.{{n}}.fc1.{{p}}",
        f"{layer}.output_query.dense.{{p}}": f"{ours}.layers.{{n}}.fc2.{{p}}",
        f"{layer}.output_query.LayerNorm.{{p}}": f"{ours}.layers.{{n}}.norm.{{p}}",
    }


def _extractor(official: str, ours: str) -> dict[str, str]:
    return {
        f"{official}.query_norm.{{p}}": f"{ours}.query_norm.{{p}}",
        f"{official}.feat_norm.{{p}}": f"{ours}.feature_norm.{{p}}",
        **_under(f"{official}.attn", f"{ours}.attention", _DEFORMABLE_ATTENTION),
        f"{official}.ffn_norm.{{p}}": f"{ours}.feed_forward_norm.{{p}}",
        f"{official}.ffn.fc1.{{p}}": f"{ours}.feed_forward.fc1.{{p}}",
        f"{official}.ffn.dwconv.dwconv.{{p}}": f"{ours}.feed_forward.depthwise.{{p}}",
        f"{official}.ffn.fc2.{{p}}": f"{ours}.feed_forward.fc2.{{p}}",
    }


def _vision() -> dict[str, str]:
    clip, interaction = "visual_tokenizer.encoder.vision_model", "vision.adapter.interactions.{n}"
    official_interaction = f"{clip}.adapter_interactions.{{n}}"
    return {
        "visual_tokenizer.clip_mean": "vision.mean",
        "visual_tokenizer.clip_std": "vision.std",
        "visual_tokenizer.pos_embed": "vision.position_table",
        "visual_tokenizer.pos_proj.{p}": "vision.token_projection.{p}",
        "visual_tokenizer.pos_ln.{p}": "vision.token_norm.{p}",
        "visual_tokenizer.post_ln.{p}": "vision.position_norm.{p}",
        "visual_tokenizer.proj.{p}": "vision.slot_projection.{p}",
        **_resampler("visual_tokenizer.perceiver_resampler", "vision.resampler"),
        **_same(
            f"{clip}.embeddings",
            "vision.clip.embeddings",
            ("class_embedding", "patch_embedding.weight", "position_embedding.weight"),
        ),
        f"{clip}.pre_layrnorm.{{p}}": "vision.clip.pre_norm.{p}",
        f"{clip}.encoder.layers.{{n}}.{{rest}}": "vision.clip.layers.{n}.{rest}",
        f"{clip}.adapter_level_embed": "vision.adapter.level_embedding",
        f"{clip}.adapter_up.{{p}}": "vision.adapter.upsample.{p}",
        **{
            f"{clip}.adapter_spm.{part}.{{n}}.{{p}}": f"vision.adapter.spatial_prior.{part}.{{n}}.{{p}}"
            for part in ("stem", "conv2", "conv3", "conv4")
        },
        **{
            f"{clip}.adapter_spm.fc{i + 1}.{{p}}": f"vision.adapter.spatial_prior.projections.{i}.{{p}}"
            for i in range(4)
        },
        f"{official_interaction}.injector.gamma": f"{interaction}.injector.gamma",
        f"{official_interaction}.injector.query_norm.{{p}}": f"{interaction}.injector.query_norm.{{p}}",
        f"{official_interaction}.injector.feat_norm.{{p}}": f"{interaction}.injector.feature_norm.{{p}}",
        **_under(
            f"{official_interaction}.injector.attn",
            f"{interaction}.injector.attention",
            _DEFORMABLE_ATTENTION,
        ),
        **_extractor(f"{official_interaction}.extractor", f"{interaction}.extractors.0"),
        # Extra extractors are counted from zero there, and follow the first one here.
        **_extractor(f"{official_interaction}.extra_extractors.0", f"{interaction}.extractors.1"),
        **_extractor(f"{official_interaction}.extra_extractors.1", f"{interaction}.extractors.2"),
    }


def _language() -> dict[str, str]:
    layer, ours = "mm_decoder.layers.{n}", "language_model.layers.{n}"
    return {
        "mm_decoder.embed_tokens.weight": "language_model.embed_tokens.weight",
        "mm_decoder.norm.weight": "language_model.norm.weight",
        f"{layer}.self_attn.{{rest}}": f"{ours}.self_attn.{{rest}}",
        f"{layer}.mlp.{{rest}}": f"{ours}.mlp.{{rest}}",
        f"{layer}.input_layernorm.weight": f"{ours}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight": f"{ours}.post_attention_layernorm.weight",
        f"{layer}.llama_cross_attn.gate": f"{ours}.synchronizer.gate",
        f"{layer}.llama_cross_attn.norm1.weight": f"{ours}.synchronizer.query_norm.weight",
        f"{layer}.llama_cross_attn.norm2.weight": f"{ours}.synchronizer.feature_norm.weight",
        **_under(f"{layer}.llama_cross_attn.attn", f"{ours}.synchronizer.synchronizer", _SYNCHRONIZER),
        "text_decoder.head.{p}": "text_head.base.{p}",
        "text_decoder.head_new.{p}": "text_head.new.{p}",
        "soi_token": "image_start_embedding",
    }


def _map_synchronizer(official: str, ours: str) -> dict[str, str]:
    return {
        f"{official}.pos_embed": f"{ours}.position_table",
        f"{official}.query_norm.{{p}}": f"{ours}.query_norm.{{p}}",
        f"{official}.feat_norm.{{p}}": f"{ours}.feature_norm.{{p}}",
        **_under(f"{official}.mmfs", f"{ours}.synchronizer", _SYNCHRONIZER),
        f"{official}.conv.{{p}}": f"{ours}.conv.{{p}}",
    }


def _image_decoder() -> dict[str, str]:
    blocks, ours = "image_decoder.decoder.mmfs_module", "image_decoder.synchronizers"
    return {
        "context_feat_proj.{p}": "context_projection.{p}",
        "image_decoder.neg_prompt_embeds": "image_decoder.negative_conditioning",
        **_resampler("image_decoder.perceiver_resampler", "image_decoder.resampler"),
        "image_decoder.decoder.unet.{rest}": "image_decoder.unet.{rest}",
        "image_decoder.decoder.vae.{rest}": "image_decoder.vae.{rest}",
        **_map_synchronizer(f"{blocks}.mmfs_down_blocks.{{n}}", f"{ours}.skips.{{n}}"),
        **_map_synchronizer(f"{blocks}.mmfs_mid_block", f"{ours}.middle"),
    }


RULES: dict[str, str] = {**_vision(), **_language(), **_image_decoder()}

# The released code counts CLIP's positions in a stored buffer; ours counts them when asked.
DERIVED_POSITION_IDS = "visual_tokenizer.encoder.vision_model.embeddings.position_ids"
_POSITION_TABLE = "vision.clip.embeddings.position_embedding.weight"

# Official tensors with leading axes of length one that ours do without.
_LEADING_AXES = {"soi_token": 1, "ignore_token": 3}


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What a list of official names is to a model: all lists sorted, empty if everything fits."""

    mapped: int
    total: int
    missing: tuple[str, ...]
    """Our parameters that no official name fills, by their official names."""
    unexpected: tuple[str, ...]
    """Official names that no rule knows, or whose place the model lacks."""
    misshapen: tuple[str, ...]
    """`name: expected shape, found shape`."""

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """Every name that does not fit, a line each, and `mapped N of N` last."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        lines = [f"{kind}: {name}" for kind, names in kinds.items() for name in names]
        return "\n".join([*lines, f"mapped {self.mapped} of {self.total}"])


def our_key(official: str) -> str | None:
    """Our name for an official one; None for `DERIVED_POSITION_IDS` and where no rule knows it."""
    return _translate(official, _TO_OURS)


def official_key(ours: str) -> str | None:
    """The official name for one of ours."""
    return _translate(ours, _TO_OFFICIAL)


def from_official(official: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """An official tensor under our name and shape; None for derived ones.

    Raises:
        KeyError: no rule knows the name.
    """
    if official == DERIVED_POSITION_IDS:
        return None
    key = our_key(official)
    if key is None:
        raise KeyError(official)
    for _ in range(_LEADING_AXES.get(official.rsplit(".", 1)[-1], 0)):
        tensor = tensor[0]
    return key, tensor


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole state dict under official names and shapes, derived tensors included.

    Raises:
        KeyError: a name that the official model lacks.
    """
    out = {}
    for ours, tensor in state.items():
        official = official_key(ours)
        if official is None:
            raise KeyError(ours)
        axes = _LEADING_AXES.get(official.rsplit(".", 1)[-1], 0)
        out[official] = tensor.reshape((1,) * axes + tuple(tensor.shape))
    if _POSITION_TABLE in state:
        out[DERIVED_POSITION_IDS] = torch.arange(state[_POSITION_TABLE].shape[0])[None]
    return out


def compare_keys(
    official: Mapping[str, tuple[int, ...] | None], ours: Mapping[str, tuple[int, ...]]
) -> KeyReport:
    """Compare official names and shapes (None = unknown) with our state dict's names and shapes."""
    unexpected, misshapen, filled = [], [], set()
    mapped = 0
    for name, shape in official.items():
        if name == DERIVED_POSITION_IDS:
            mapped += 1
            continue
        key = our_key(name)
        if key is None or key not in ours:
            unexpected.append(name)
            continue
        filled.add(key)
        expected = (1,) * _LEADING_AXES.get(name.rsplit(".", 1)[-1], 0) + tuple(ours[key])
        if shape is not None and tuple(shape) != expected:
            misshapen.append(f"{name}: expected {expected}, found {tuple(shape)}")
        else:
            mapped += 1
    missing = [official_key(key) or key for key in ours if key not in filled]
    return KeyReport(
        mapped, len(official), tuple(sorted(missing)), tuple(sorted(unexpected)), tuple(sorted(misshapen))
    )


def _compile(rules: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for source, target in rules.items():
        pattern = re.escape(source)
        for placeholder, group in _PLACEHOLDERS.items():
            pattern = pattern.replace(re.escape(placeholder), group)
        names = re.findall(r"\{\w+\}", source)
        for i, name in enumerate(names):
            target = target.replace(name, rf"\{i + 1}")
        compiled.append((re.compile(pattern), target))
    return compiled


def _translate(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(target)
    return None


_TO_OURS = _compile(RULES)
_TO_OFFICIAL = _compile({ours: official for official, ours in RULES.items()})
