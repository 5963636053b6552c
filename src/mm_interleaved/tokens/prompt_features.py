"""A batch of prompts as users of transformers take it: by the names of `model.generate`."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature

from mm_interleaved.tokens.batch import Batch


def prompt_features(batch: Batch, return_tensors: Any, *, has_masks: bool = False) -> BatchFeature:
    """`input_ids` and `attention_mask` (B, T) and, if there are images, `pixel_values` (I, 3, H, W) and
    `image_start` (B, N).

    Args:
        return_tensors: "pt", "np", or None for lists; pixels are never lists.
        has_masks: also `assistant_masks` (B, T), 1 where the assistant speaks.

    Raises:
        ValueError: another kind of tensors.
    """
    data: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    if batch.num_images:
        data |= {"pixel_values": batch.pixel_values, "image_start": batch.image_start}
    if has_masks:
        data["assistant_masks"] = batch.text_target.long()
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in ("pt", "np", "auto", None):
        raise ValueError(f"return_tensors: expected 'pt', 'np' or None, found {return_tensors!r}")
    if kind != "pt":
        data = {name: tensor.numpy() for name, tensor in data.items()}
    if kind not in ("pt", "np"):
        data = {name: value if name == "pixel_values" else value.tolist() for name, value in data.items()}
    return BatchFeature(data)
