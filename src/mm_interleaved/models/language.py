"""Language models whose layers look into images between self-attention and feed-forward.

Any family with the anatomy of Llama fits: its own decoder layer is subclassed with the few lines of `forward`
that the synchronizer needs, and every stock parameter keeps its name.
Letters: B rows, T tokens, V vocabulary, D hidden channels, N images a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from mm_interleaved.models.folding import project_for_all
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.initialisation import OwnInitialisation, is_loaded


@dataclass(frozen=True, slots=True)
class ImageView:
    """What the layers need in order to look at images during one forward pass.

    `values`: projected features by layer index. `relative_index_BTN`: int64, 1 = newest visible image, 0 =
    hidden.
    """

    values: Mapping[int, ImageValues]
    relative_index_BTN: Tensor  # noqa: N815


class _InterleavedForward:
    """A Llama-shaped layer's forward with the synchronizer between self-attention and feed-forward."""

    def forward(
        self, hidden_states: Tensor, image_view: ImageView | None = None, **attention_arguments: Any
    ) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention_arguments)
        hidden_states = hidden_states + attended
        if image_view is not None:
            values = image_view.values[self.self_attn.layer_idx]
            hidden_states = hidden_states + self.synchronizer(
                hidden_states, values, image_view.relative_index_BTN
            )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class InterleavedLlamaDecoderLayer(_InterleavedForward, LlamaDecoderLayer):
    """Llama's layer that can look at images."""


class InterleavedMistralDecoderLayer(_InterleavedForward, MistralDecoderLayer):
    """Mistral's layer that can look at images."""


class InterleavedQwen2DecoderLayer(_InterleavedForward, Qwen2DecoderLayer):
    """Qwen2's layer that can look at images."""


class InterleavedQwen3DecoderLayer(_InterleavedForward, Qwen3DecoderLayer):
    """Qwen3's layer that can look at images."""


class _InterleavedModel(OwnInitialisation):
    """A stock language model, some of whose layers get a synchronizer."""

    layer_class: type[nn.Module]
    layers: nn.ModuleList

    def __init__(
        self, config: PreTrainedConfig, synchronizers: Mapping[int, GatedSynchronizer] | None = None
    ):
        super().__init__(config)
        for index, synchronizer in (synchronizers or {}).items():
            layer = self.layer_class(config, index)
            layer.synchronizer = synchronizer
            self.layers[index] = layer
        self.synchronized_layers = tuple(sorted(synchronizers or {}))
        self.post_init()

    def project_images(self, cells: Tensor, level_sizes: tuple[int, ...]) -> dict[int, ImageValues]:
        """Each synchronized layer's projection of features (..., S, C); keep it."""
        blocks: list[Any] = [self.layers[index].synchronizer for index in self.synchronized_layers]
        return dict(zip(self.synchronized_layers, project_for_all(blocks, cells, level_sizes), strict=True))


class InterleavedLlamaModel(_InterleavedModel, LlamaModel):
    """Llama with synchronizers."""

    layer_class = InterleavedLlamaDecoderLayer


class InterleavedMistralModel(_InterleavedModel, MistralModel):
    """Mistral with synchronizers."""

    layer_class = InterleavedMistralDecoderLayer


class InterleavedQwen2Model(_InterleavedModel, Qwen2Model):
    """Qwen2 with synchronizers."""

    layer_class = InterleavedQwen2DecoderLayer


class InterleavedQwen3Model(_InterleavedModel, Qwen3Model):
    """Qwen3 with synchronizers."""

    layer_class = InterleavedQwen3DecoderLayer


LANGUAGE_FAMILIES: dict[str, type[_InterleavedModel]] = {
    "llama": InterleavedLlamaModel,
    "mistral": InterleavedMistralModel,
    "qwen2": InterleavedQwen2Model,
    "qwen3": InterleavedQwen3Model,
}


def language_family(model_type: str) -> type[_InterleavedModel]:
    """The class for a transformers `model_type`.

    Raises:
        ValueError: the family has another anatomy.
    """
    if model_type not in LANGUAGE_FAMILIES:
        raise ValueError(
            f"language model of type {model_type!r} does not fit: "
            f"expected one of {sorted(LANGUAGE_FAMILIES)}, "
            "whose layers are norm, self-attention, norm, feed-forward"
        )
    return LANGUAGE_FAMILIES[model_type]


OLD_HEAD_BIAS, NEW_HEAD_BIAS = -100.0, 95.0
"""Where the two heads of a new token start (released code)."""


class TextHead(nn.Module):
    """Next-word logits in two parts: a frozen head for the old vocabulary, a small one for the new tokens.

    The old head's rows for the new tokens start at weight 0 and bias -100, the new head's at bias +95, so
    that a pretrained language model never says a new token before it has learned to (released code).

    Args:
        num_new: the last tokens of the vocabulary, which the old head does not know.
    """

    def __init__(self, dim: int, vocab_size: int, num_new: int):
        super().__init__()
        self.num_new = num_new
        self.base = nn.Linear(dim, vocab_size)
        self.new = nn.Linear(dim, num_new)
        self.reset_parameters()

    @torch.no_grad()
    def set_base(self, base: nn.Linear) -> None:
        """Take another old head, whose vocabulary ends later or earlier: tokens added are new ones, and start
        as those do.
        """
        added, old = base.out_features - self.base.out_features, self.new
        self.base, self.num_new = base, self.num_new + added
        self.new = nn.Linear(
            old.in_features, self.num_new, device=old.weight.device, dtype=old.weight.dtype
        ).train(old.training)
        self.new.requires_grad_(old.weight.requires_grad)
        first_added, kept = base.out_features - max(added, 0), min(self.num_new, old.out_features)
        for linear, first, bias in ((base, first_added, OLD_HEAD_BIAS), (self.new, kept, NEW_HEAD_BIAS)):
            linear.weight[first:] = 0
            linear.bias[first:] = bias
        self.new.weight[:kept], self.new.bias[:kept] = old.weight[:kept], old.bias[:kept]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.normal_(self.base.weight, std=0.02)
        init.zeros_(self.base.bias)
        if not is_loaded(self.base.weight):
            self.base.weight[-self.num_new :] = 0
        if not is_loaded(self.base.bias):
            self.base.bias[-self.num_new :] = OLD_HEAD_BIAS
        init.zeros_(self.new.weight)
        init.constant_(self.new.bias, NEW_HEAD_BIAS)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        base_BTV = self.base(hidden_BTD)
        return torch.cat(
            [base_BTV[..., : -self.num_new], base_BTV[..., -self.num_new :] + self.new(hidden_BTD)], dim=-1
        )
