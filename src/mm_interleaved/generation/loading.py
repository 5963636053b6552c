"""What a model's files tell unread; the loaded generator.

Which folder a name means, see `model_files.resolve`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import FORMATS, slowness, torch_device, weight_format
from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import ModelFileError, NumericalError, UsageError, escape
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.headers import read_json, saved_format
from mm_interleaved.model_files.resolve import CONFIG, SHIPPED, find_model, model_files
from mm_interleaved.model_files.values import check_object
from mm_interleaved.spelling import guess

if TYPE_CHECKING:
    import torch

    from mm_interleaved.generation import InterleavedGenerator

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """What is done to a model so that it paints faster, see `models.acceleration`, or writes faster:
    weights in few bits, see `models.quantization`.
    """

    channels_last: bool = False
    compile: bool = False
    adapter: Path | None = None
    quantization: str | None = None

    def record(self) -> dict[str, Any]:
        """What a manifest tells of it: what is not as it is by default, an adapter with its hash.

        Raises:
            ModelFileError: the adapter is no folder.
        """
        told: dict[str, Any] = {name: True for name in ("channels_last", "compile") if getattr(self, name)}
        if self.adapter is not None:
            if not self.adapter.is_dir():
                raise ModelFileError(f"adapter {escape(str(self.adapter))!r}: there is no such folder")
            told["adapter"] = {"folder": str(self.adapter), "sha256": hash_model(self.adapter)}
        if self.quantization is not None:
            told["quantization"] = self.quantization
        return told

    @classmethod
    def of_record(cls, told: Mapping[str, Any]) -> Acceleration:
        """The same again. Raises ModelFileError if the adapter's files have changed."""
        adapter = told.get("adapter")
        found = cls(
            channels_last=told.get("channels_last", False),
            compile=told.get("compile", False),
            adapter=None if adapter is None else Path(adapter["folder"]),
            quantization=told.get("quantization"),
        )
        if found.record() != dict(told):
            raise ModelFileError(
                f"adapter {escape(str(found.adapter))!r}: its files are not those of the run"
            )
        return found


AS_IT_IS = Acceleration()

__all__ = [
    "AS_IT_IS",
    "SHIPPED",
    "Acceleration",
    "find_model",
    "generation_defaults",
    "hash_model",
    "load_generator",
    "read_config",
]


def read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration as JSON. Raises ModelFileError."""
    config = read_json(folder / CONFIG)
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "mm_interleaved":
        raise ModelFileError(
            f"{folder / CONFIG}: model_type {escape(repr(found))}, expected 'mm_interleaved'"
        )
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


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings that a model prefers over the general defaults. Raises ModelFileError."""
    found = config.get("generation_settings") or {}
    if not isinstance(found, Mapping):
        raise ModelFileError(
            f"{CONFIG}: generation_settings: found {escape(repr(found))}, expected an object"
        )
    try:
        GenerationSettings.combine(found)
    except UsageError as error:
        raise ModelFileError(f"{CONFIG}: generation_settings: {error}", field=error.field) from error
    return dict(found)


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files: the same hash, the same output."""
    total = hashlib.sha256()
    for path in model_files(folder):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def load_generator(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", acceleration: Acceleration = AS_IT_IS
) -> InterleavedGenerator:
    """A model that is ready to continue documents.

    Args:
        model: its name, see `model_files.resolve`: "storyworld", a folder, or a hub id.
        device: a torch device, or "auto": a GPU where there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": as saved where the device is fast in that, else
            float32 (see `devices`).

    Raises:
        ModelFileError: no model of ours, or an adapter that does not fit it.
        UsageError: what cannot be had here: the device, an adapter without PEFT, a model that does not paint,
            weights in few bits without the library that they need.
        NumericalError: weights that are no finite numbers.
    """
    from mm_interleaved import InterleavedGenerator, MMInterleavedProcessor
    from mm_interleaved.checkpoint.load import load_model, model_file_errors
    from mm_interleaved.models.finite import damaged_weight
    from mm_interleaved.models.quantization import weight_only

    place = torch_device(device)
    folder = find_model(model)
    kind = _number_format(dtype, folder, place)
    if acceleration.quantization is None:
        # nn.Module's stub has no device among the types that `to` takes.
        loaded: Any = load_model(folder, dtype=kind)
        loaded = loaded.to(place)
    else:
        # Weights in few bits are made where they shall stay.
        few_bits = weight_only(acceleration.quantization)
        loaded = load_model(folder, dtype=kind, device_map=place, quantization_config=few_bits)
    with model_file_errors(folder):
        processor = MMInterleavedProcessor.from_pretrained(folder)
    adapter = _accelerate(loaded, acceleration)
    # Weights in few bits cannot be asked; what they are made of was finite, or is caught where it is used.
    if acceleration.quantization is None and (name := damaged_weight(loaded)) is not None:
        raise NumericalError(f"{folder}: {name} holds numbers that are not finite")
    return InterleavedGenerator(loaded, processor, adapter=adapter)


def _number_format(dtype: str, folder: Path, place: torch.device) -> str:
    """The format of the weights: the one that was asked for by name, else what suits the device."""
    if dtype == "auto":
        return weight_format(saved_format(folder), place).name
    if dtype not in FORMATS:
        raise UsageError(
            f"dtype: expected auto, {', '.join(FORMATS)}, found {escape(dtype)!r}{guess(dtype, FORMATS)}",
            field="dtype",
        )
    if remark := slowness(dtype, place):
        logger.warning("%s", remark)
    return dtype


def _accelerate(model: Any, acceleration: Acceleration) -> Any:
    from mm_interleaved.models import acceleration as ways

    if replace(acceleration, quantization=None) == AS_IT_IS:
        return None
    if model.image_decoder is None:
        raise UsageError("channels_last, compile, adapter: this model does not paint")
    adapter = None if acceleration.adapter is None else ways.load_adapter(model, acceleration.adapter)
    if acceleration.channels_last:
        ways.use_channels_last(model.image_decoder)
    if acceleration.compile:
        ways.compile_painter(model.image_decoder)
    return adapter
