"""How large a vocabulary a model may have, and whether it can be made so."""

from numbers import Integral

from torch import nn

from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.language import TextHead
from mm_interleaved.models.weights_at_hand import weights_at_hand


def check_vocabulary_size(config: MMInterleavedConfig, size: int) -> None:
    """Special tokens, and one of the new ones at least, are inside the vocabulary.

    Raises:
        ValueError: they are not, or the size is no whole number.
    """
    if not isinstance(size, Integral):
        raise ValueError(f"resize_token_embeddings: found {size!r}, expected a whole number of tokens")
    special = (
        config.image_start_token_id, config.image_token_id,
        config.bos_token_id, config.eos_token_id, config.pad_token_id,
    )  # fmt: skip
    least = 1 + max(*special, config.text_config.vocab_size - config.num_new_tokens)
    if size < least:
        raise ValueError(
            f"resize_token_embeddings: found {size} tokens, expected at least {least}, "
            "which the special tokens need"
        )


def check_resizable(embeddings: nn.Module, head: TextHead) -> None:
    """Weights of another shape can be put in the place of these.

    Raises:
        ValueError: a library has put something else in their place, or keeps them elsewhere.
    """
    modules, kinds = (embeddings, head, head.base, head.new), (nn.Embedding, nn.Linear, TextHead)
    if weights_at_hand(modules, kinds) is None:
        raise ValueError(
            "resize_token_embeddings: the weights are offloaded, sharded, quantised or have adapters; "
            "resize the model before"
        )


def rounded_up(number: int, multiple: int | None) -> int:
    """To a multiple, if one is asked for."""
    return number if multiple is None else -(-number // multiple) * multiple
