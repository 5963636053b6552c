"""The stock parts of the official model, found in component folders by what their configurations say.

Any folder below the given one counts, at whatever depth and under whatever name: a language model, a CLIP
model, a diffusion pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_interleaved.errors import ModelFileError
from mm_interleaved.model_files.headers import read_json

_MAX_DEPTH = 6
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# What shapes a model; the published files also hold how it was stored, run and sampled from.
_SETTINGS = {
    "llm": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
            "rope_theta",
            "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id"),
    "clip": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
             "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
}  # fmt: skip


@dataclass(slots=True)
class Components:
    """What was found; `settings` in the terms of `released_config`, by part."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: Path | None = None
    """Folder of the language model's tokenizer."""


def find_components(folder: Path) -> Components:
    """Every component below a folder.

    Raises:
        ModelFileError: there is none, or two of a kind.
    """
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: there is no such folder, expected the stock parts of the model")
    found, places = Components(), {}
    for part, path, settings in _walk(folder):
        if part in places:
            raise ModelFileError(
                f"{folder}: holds two parts of the kind {part}, {places[part]} and {path.parent}"
            )
        places[part] = path.parent
        found.settings[part] = settings
        if part == "llm" and any((path.parent / name).is_file() for name in _TOKENIZER_FILES):
            found.tokenizer = path.parent
    if not places:
        raise ModelFileError(
            f"{folder}: holds no config.json of a Llama, of CLIP or of a diffusion model, expected those"
        )
    return found


def _walk(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(part, its file, its settings) of every known configuration file."""
    base_depth = len(folder.parts)
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders.sort()
        if len(here.parts) - base_depth >= _MAX_DEPTH:
            folders.clear()
        if "model_index.json" in files:
            # Of a pipeline's other parts some are CLIP models too, and not the one that is looked for.
            folders[:] = [name for name in folders if name in ("unet", "vae", "scheduler")]
        for name in sorted(files):
            if name in ("config.json", "scheduler_config.json"):
                settings = read_json(here / name)
                part = _kind(settings)
                if part is not None:
                    yield part, here / name, _cleaned(part, settings)


def _kind(settings: Any) -> str | None:
    if not isinstance(settings, Mapping):
        return None
    class_name = str(settings.get("_class_name", ""))
    if class_name.endswith("Scheduler"):
        return "scheduler"
    by_class = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    by_type = {"llama": "llm", "clip": "clip", "clip_vision_model": "clip"}
    return by_class.get(class_name) or by_type.get(str(settings.get("model_type")))


def _cleaned(part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `released_config` takes them."""
    if part == "clip" and "vision_config" in settings:
        # A whole CLIP model: the published file holds its vision side twice, and the older name counts.
        settings = {**settings["vision_config"], **(settings.get("vision_config_dict") or {})}
    known = _SETTINGS.get(part, settings)
    return {name: value for name, value in settings.items() if name in known and not name.startswith("_")}
