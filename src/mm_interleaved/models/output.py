"""What a pass of the model returns."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from mm_interleaved.models.transformers_versions import CACHE


@dataclass
class MMInterleavedOutput(ModelOutput):
    """`loss` is the weighted sum of `text_loss` and `image_loss`; losses are None without targets.

    `logits`: (B, T, V), or of the last `logits_to_keep` tokens. `hidden`: (B, T, D), final hidden states.
    `hidden_states`, `attentions`: of all layers of the language model, where they were asked for. The cache
    is read as `cache` and as `past_key_values`, whatever the installed transformers calls it.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    # `generate` looks for the field by the library's name for it; the other name is a property.
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
        cache = property(attrgetter("past_key_values"))

    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
