"""A model's name in, its folder out; what its files tell unread; the loaded generator.

A name is `storyworld` (the shipped model), a folder, or an id on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import ModelFileError, UsageError, escape

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

SHIPPED = ("storyworld",)
CONFIG = "config.json"
_HASHED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """What is done to a model so that it paints faster, see `generation.acceleration`, or writes faster:
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


def find_model(name: str) -> Path:
    """The folder of a model. Raises ModelFileError, which tells where it was looked for."""
    if name in SHIPPED:
        folder = Path(str(files("mm_interleaved") / "assets" / name))
        where = f"the shipped model {name!r}"
    elif os.path.exists(name):
        folder, where = Path(name), f"model {escape(name)!r}"
    else:
        folder, where = _from_hub(name), f"model {escape(name)!r}"
    if not os.path.isfile(folder / CONFIG):
        raise ModelFileError(
            f"{where}: no {CONFIG} in {folder}, expected a folder that save_pretrained wrote"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration as JSON. Raises ModelFileError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{folder / CONFIG}: cannot be read as JSON ({error})") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "mm_interleaved":
        raise ModelFileError(f"{folder / CONFIG}: model_type {found!r}, expected 'mm_interleaved'")
    return config


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings that a model prefers over the general defaults. Raises ModelFileError."""
    found = config.get("generation_settings") or {}
    if not isinstance(found, Mapping):
        raise ModelFileError(
            f"{CONFIG}: generation_settings: found {escape(repr(found))}, expected an object"
        )
    return dict(found)


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files: the same hash, the same output."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _HASHED_SUFFIXES and path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def load_generator(
    folder: Path, *, device: str = "auto", dtype: str = "auto", acceleration: Acceleration = AS_IT_IS
) -> InterleavedGenerator:
    """The model of a folder, ready to continue documents.

    Args:
        device: a torch device, or "auto": a GPU where there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": as saved on a GPU, float32 on a CPU.

    Raises:
        ModelFileError: no model of ours, or an adapter that does not fit it.
        UsageError: what cannot be had here: the device, an adapter without PEFT, a model that does not paint,
            weights in few bits without the library that they need.
    """
    from mm_interleaved import InterleavedGenerator, MMInterleavedProcessor
    from mm_interleaved.checkpoint.load import load_model, model_file_errors
    from mm_interleaved.models.quantization import weight_only

    place = torch_device(device)
    kind = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    if acceleration.quantization is None:
        # nn.Module's stub has no device among the types that `to` takes.
        loaded: Any = load_model(folder, dtype=kind)
        model = loaded.to(place)
    else:
        # Weights in few bits are made where they shall stay.
        few_bits = weight_only(acceleration.quantization)
        model = load_model(folder, dtype=kind, device_map=place, quantization_config=few_bits)
    with model_file_errors(folder):
        processor = MMInterleavedProcessor.from_pretrained(folder)
    adapter = _accelerate(model, acceleration)
    return InterleavedGenerator(model, processor, adapter=adapter)


def _accelerate(model: Any, acceleration: Acceleration) -> Any:
    from mm_interleaved.generation import acceleration as ways

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


def torch_device(name: str):
    """The torch device of that name; "auto" is a GPU where there is one. Raises UsageError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sentence = escape(str(error).splitlines()[0])
        raise UsageError(
            f"device {escape(name)!r}: cannot be used here ({sentence})", field="device"
        ) from error
    return device


def _from_hub(name: str) -> Path:
    nearest = get_close_matches(name, SHIPPED, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    looked = f"model {escape(name)!r}: no such folder{hint}"
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        raise ModelFileError(f"{looked}, and not a hub id (owner/name); shipped is {', '.join(SHIPPED)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    for is_local in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=is_local))
        except Exception as error:  # the hub client raises a dozen kinds; all mean that it is not to be had
            reason = error
    raise ModelFileError(
        f"{looked}, not in the hub cache {HF_HUB_CACHE}, and huggingface.co gave {type(reason).__name__}"
    )
