"""What differs between the transformers that we run with (5.17 to 5.24), in one place.

Names are read off the library itself. Everything else of ours says `cache`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The argument, output field and keyword of `generate` that holds the cache: `cache` since 5.24."""

_VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
CHUNKS_CONTINUE = _VERSION >= (5, 21)
"""Whether `generate(prefill_chunk_size=...)` goes on behind what a cache holds, or reads all of it again."""


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given, by its new name or by its old one; None where there is none.

    Raises:
        ValueError: both were given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: expected one, found both")
    return past_key_values if cache is None else cache


def checkpointing_enable(model: PreTrainedModel) -> Callable[[dict[str, Any]], None]:
    """The method that lets a model compute activations again in the backward pass.

    `activation_checkpointing_enable` since 5.23, which warns of the old name; 6.0 removes that.
    """
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
