"""What a pass of the model takes besides tokens and images: targets of training, and what libraries pass.

Letters: B rows, T tokens, I images of all rows in row-major order.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from mm_interleaved.models.denoising import DiffusionNoise
from mm_interleaved.models.image_placement import check_number, check_one_document, count_images
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.tokens.visibility import isolated_causal_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTargets:
    """What a pass shall learn, and which documents its rows hold. Without `text_target` and
    `target_pixel_values` no loss is computed.
    """

    document_start: Tensor | None = None
    """(B, T) int64, first token of each token's document; default: one document a row. Documents of a row do
    not see each other and count their positions from zero, unless the model's `compat` is "released"."""
    text_target: Tensor | None = None
    """(B, T) bool, tokens that count in the text loss."""
    image_target: Tensor | None = None
    """(I,) bool, images that count in the image loss; default all that something announces."""
    target_pixel_values: Tensor | None = None
    """(I, 3, h, w) RGB in [0, 1], what the image decoder shall generate."""
    noise: DiffusionNoise | None = None
    """Random numbers of the image loss; default: sampled in the pass."""
    image_weight: Tensor | None = None
    """(I,) factor of each image's error (see `training.objectives`); default 1."""
    hide_earlier: Tensor | None = None
    """(I,) bool, images to be generated without seeing earlier ones (synchronizer dropout); default none."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no loss to compute."""
        return self.text_target is None and not self.has_images

    @property
    def has_images(self) -> bool:
        """Whether any image is to be generated."""
        return self.target_pixel_values is not None and len(self.target_pixel_values) > 0


class OtherArguments(TypedDict, total=False):
    """What `forward` takes by name besides its own parameters."""

    # The fields of a batch that is passed as a mapping, `model(**batch)`: those of `TrainingTargets`.
    document_start: Tensor | None
    text_target: Tensor | None
    image_target: Tensor | None
    target_pixel_values: Tensor | None
    # transformers': make a cache where none is given, and return it; `cache` by its name before 5.24; also
    # return attentions or hidden states of the language model (default: as the configuration says).
    use_cache: bool | None
    past_key_values: Any
    output_attentions: bool | None
    output_hidden_states: bool | None


# Constants: compiled decoding passes here, and cannot ask a class for its fields.
NO_TARGETS = TrainingTargets()
BATCH_FIELDS = ("document_start", "text_target", "image_target", "target_pixel_values")
LIBRARY_ARGUMENTS = ("use_cache", "past_key_values", "output_attentions", "output_hidden_states")
FORMER_NAMES = {"draws": "noise", "image_weight": "image_weight", "hide_earlier": "hide_earlier"}
"""Arguments of `forward` in 0.1 that no batch has, and the fields of `TrainingTargets` that they are now."""


def gathered_targets(targets: TrainingTargets | None, others: Mapping[str, Any]) -> TrainingTargets:
    """The targets of a pass, with those that are given one by one among other arguments.

    Raises:
        TypeError: an argument that `forward` does not know.
        ValueError: a field given both ways.
    """
    single: dict[str, Any] = {}
    for name, value in others.items():
        if name in LIBRARY_ARGUMENTS:
            continue
        if name in FORMER_NAMES:
            warnings.warn(
                f"forward({name}=…) is deprecated: give targets=TrainingTargets({FORMER_NAMES[name]}=…)",
                DeprecationWarning,
                stacklevel=4,
            )
        elif name not in BATCH_FIELDS:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if value is not None:
            single[FORMER_NAMES.get(name, name)] = value
    if not single:
        return NO_TARGETS if targets is None else targets
    if targets is None:
        return TrainingTargets(**single)
    both = [name for name in single if getattr(targets, name) is not None]
    if both:
        raise ValueError(f"targets: found {', '.join(sorted(both))} in them and beside them, expected one")
    return replace(targets, **single)


def check_targets(
    targets: TrainingTargets,
    input_ids_BT: Tensor | None,
    image_start_BN: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
) -> None:
    """What shall be learned has what it is learned from; of what stands behind a cache nothing is learned.

    Raises:
        ValueError: it has not, or the cache cannot remember the images.
    """
    if targets.text_target is not None and input_ids_BT is None:
        raise ValueError("text_target needs input_ids, found none")
    if targets.has_images:
        if pixel_values is None:
            raise ValueError("target_pixel_values needs pixel_values, found none")
        count = count_images(image_start_BN)
        check_number(targets.target_pixel_values, count, "image_start", "target_pixel_values")
    if cache is None:
        return
    if targets.has_images:
        raise ValueError("target_pixel_values needs whole rows, found a cache: give none")
    if pixel_values is not None and len(pixel_values) and not isinstance(cache, PrefixCache):
        raise ValueError(f"cache: images need a PrefixCache, found {type(cache).__name__}")
    if targets.document_start is not None:
        check_one_document(targets.document_start, attention_mask)


def kept_apart(
    document_start_BT: Tensor | None,
    embeddings_BTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    are_apart: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Start of each token's document, mask and positions of a pass whose rows may hold several documents.

    Args:
        are_apart: documents of a row do not see each other and count their positions from zero; without it
            the mask and the positions stay as they are.
    """
    if document_start_BT is None:
        start_BT = torch.zeros_like(embeddings_BTD[..., 0], dtype=torch.int64)
        return start_BT, attention_mask, position_ids
    if not are_apart:
        return document_start_BT, attention_mask, position_ids
    if position_ids is None:
        position_T = torch.arange(document_start_BT.shape[1], device=document_start_BT.device)
        position_ids = position_T - document_start_BT
    return document_start_BT, isolated_causal_mask(document_start_BT, attention_mask), position_ids
