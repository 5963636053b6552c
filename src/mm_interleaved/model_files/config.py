"""A model's config.json as it was saved; builds nothing of it and loads neither torch nor transformers.

What a model can be built from is checked by `checkpoint.load.read_model_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import ModelFileError, escape
from mm_interleaved.model_files.headers import read_json
from mm_interleaved.model_files.resolve import CONFIG
from mm_interleaved.model_files.values import check_object

MODEL_TYPE = "mm_interleaved"
"""What transformers knows our models by."""

# What commands read of a configuration without building anything of it.
_SYNCHRONIZER = dict.fromkeys(("every", "max_images", "num_heads", "value_dim"), int) | {"levels": list[int]}
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "text_config": dict.fromkeys(
        ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
         "num_hidden_layers", "vocab_size"),
        int,
    ),
    "vision_config": dict.fromkeys(("hidden_size", "image_size", "num_hidden_layers", "patch_size"), int),
    "slot_resampler": {"num_queries": int},
}  # fmt: skip
_WHERE_THERE: Mapping[str, Mapping[str, Any]] = {
    "text_synchronizer": _SYNCHRONIZER,
    "image_synchronizer": _SYNCHRONIZER,
    "conditioning_resampler": {"num_queries": int},
    "unet_config": {"block_out_channels": list[int]},
    "vae_config": {"block_out_channels": list[int]},
    "scheduler_config": {},
    "generation_settings": {},
}


def read_own_config(folder: Path) -> dict[str, Any]:
    """The fields of a configuration, unchecked. Raises ModelFileError where it is no model of ours."""
    config = read_json(folder / CONFIG)
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != MODEL_TYPE:
        raise ModelFileError(f"{folder / CONFIG}: model_type {escape(repr(found))}, expected {MODEL_TYPE!r}")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration as JSON, with all that commands need of it.

    Raises:
        ModelFileError: no configuration of ours, or one that lacks a field; names it.
    """
    config = read_own_config(folder)
    try:
        check_object(config, {}, "")
        for part, needed in {**_NEEDED, **_WHERE_THERE}.items():
            if part in _NEEDED or config.get(part) is not None:
                _check_fields(config.get(part), needed, part)
    except FieldError as error:
        raise ModelFileError(f"{folder / CONFIG}: {error}", field=error.path) from error
    return config


def _check_fields(part: Any, needed: Mapping[str, Any], name: str) -> None:
    """Refuses a part of a configuration that lacks what is needed of it. Raises FieldError."""
    check_object(part, needed, name)
    missing = [field for field in needed if field not in part]
    if missing:
        raise FieldError(f"{name}.{missing[0]}", "missing")
