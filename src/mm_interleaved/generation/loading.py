"""A model's name in, a generator that is ready to continue documents out.

Which folder a name means, see `model_files.resolve`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import FORMATS, model_format, torch_device
from mm_interleaved.errors import ModelFileError, NumericalError, UsageError, escape
from mm_interleaved.model_files.hashing import hash_model
from mm_interleaved.model_files.headers import saved_format
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.spelling import guess

if TYPE_CHECKING:
    import torch

    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.models.memory_plan import MemoryPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """What is done to a model so that it generates images faster, see `models.acceleration`, or takes less
    memory: weights in few bits, see `models.quantization`.
    """

    channels_last: bool = False
    compile: bool = False
    adapter: Path | None = None
    quantization: str | None = None

    def record(self) -> dict[str, Any]:
        """What a manifest records of it: what differs from the default, an adapter with its hash.

        Raises:
            ModelFileError: the adapter is no folder.
        """
        recorded: dict[str, Any] = {
            name: True for name in ("channels_last", "compile") if getattr(self, name)
        }
        if self.adapter is not None:
            if not self.adapter.is_dir():
                raise ModelFileError(f"adapter {escape(str(self.adapter))!r}: there is no such folder")
            recorded["adapter"] = {"folder": str(self.adapter), "sha256": hash_model(self.adapter)}
        if self.quantization is not None:
            recorded["quantization"] = self.quantization
        return recorded

    @classmethod
    def of_record(cls, recorded: Mapping[str, Any]) -> Acceleration:
        """The same again. Raises ModelFileError if the adapter's files have changed."""
        adapter = recorded.get("adapter")
        found = cls(
            channels_last=recorded.get("channels_last", False),
            compile=recorded.get("compile", False),
            adapter=None if adapter is None else Path(adapter["folder"]),
            quantization=recorded.get("quantization"),
        )
        if found.record() != dict(recorded):
            raise ModelFileError(
                f"adapter {escape(str(found.adapter))!r}: its files are not those of the run"
            )
        return found


AS_IT_IS = Acceleration()


def load_generator(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    acceleration: Acceleration = AS_IT_IS,
    plan: MemoryPlan | None = None,
) -> InterleavedGenerator:
    """A model that is ready to continue documents.

    Args:
        model: its name, see `model_files.resolve`: "storyworld", a folder, or a hub id.
        device: a torch device, or "auto": a GPU where there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": as saved where the device is fast in that, else
            float32 (see `devices`).
        plan: what is kept where so that it fits (`load_fitting` makes one), in place of `dtype` and of the
            acceleration's quantization.

    Raises:
        ModelFileError: no model of ours, or an adapter that does not fit it.
        UsageError: what cannot be had here: the device, an adapter without PEFT, a model that generates no
            images, weights in few bits without the library that they need.
        NumericalError: weights that are no finite numbers.
    """
    from mm_interleaved import InterleavedGenerator, MMInterleavedProcessor
    from mm_interleaved.checkpoint.load import load_model, model_file_errors
    from mm_interleaved.checkpoint.offloaded import load_offloaded
    from mm_interleaved.models.finite import damaged_weight
    from mm_interleaved.models.quantization import weight_only

    place = torch_device(device)
    folder = find_model(model)
    if plan is not None:
        dtype, acceleration = plan.dtype, replace(acceleration, quantization=plan.quantization)
    kind = _number_format(dtype, folder, place)
    if plan is not None and plan.offload is not None:
        loaded: Any = load_offloaded(folder, kind, place, plan)
    elif acceleration.quantization is None:
        # nn.Module's stub has no device among the types that `to` takes.
        loaded = load_model(folder, dtype=kind)
        loaded = loaded.to(place)
    else:
        # Weights in few bits are made where they shall stay.
        few_bits = weight_only(acceleration.quantization)
        loaded = load_model(folder, dtype=kind, device_map=place, quantization_config=few_bits)
    with model_file_errors(folder):
        processor = MMInterleavedProcessor.from_pretrained(folder)
    adapter = _accelerate(loaded, acceleration)
    # Weights in few bits, or elsewhere, cannot be asked; what is not finite is caught where it is used.
    is_at_hand = acceleration.quantization is None and (plan is None or plan.offload is None)
    if is_at_hand and (name := damaged_weight(loaded)) is not None:
        raise NumericalError(f"{folder}: {name} holds numbers that are not finite")
    return InterleavedGenerator(loaded, processor, adapter=adapter)


def _number_format(dtype: str, folder: Path, place: torch.device) -> str:
    """The format of the weights: the one that was asked for by name, else what suits the device."""
    is_asked = dtype != "auto"
    if is_asked and dtype not in FORMATS:
        raise UsageError(
            f"dtype: expected auto, {', '.join(FORMATS)}, found {escape(dtype)!r}{guess(dtype, FORMATS)}",
            field="dtype",
        )
    chosen = model_format(dtype, "" if is_asked else saved_format(folder), place)
    if is_asked and chosen.remark:
        logger.warning("%s", chosen.remark)
    return chosen.name


def _accelerate(model: Any, acceleration: Acceleration) -> Any:
    from mm_interleaved.models import acceleration as ways

    if replace(acceleration, quantization=None) == AS_IT_IS:
        return None
    if model.image_decoder is None:
        raise UsageError("channels_last, compile, adapter: this model generates no images")
    adapter = None if acceleration.adapter is None else ways.load_adapter(model, acceleration.adapter)
    if acceleration.channels_last:
        ways.use_channels_last(model.image_decoder)
    if acceleration.compile:
        ways.compile_image_decoder(model.image_decoder)
    return adapter
