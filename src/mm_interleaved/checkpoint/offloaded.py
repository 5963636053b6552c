"""A model of which a device has not room for all weights: they wait in the host's memory, or on its disk.

accelerate brings each module's weights before it computes; what that needs of our modules is in
`models.offloading`. Exact, and slower by the reading.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.memory_plan import MemoryPlan


def load_offloaded(
    folder: Path, dtype: str, device: torch.device, plan: MemoryPlan
) -> MMInterleavedForConditionalGeneration:
    """The model of a folder, as much of it on a device as a plan allows.

    Files for weights on the disk are removed when the model is no longer used.

    Raises:
        ModelFileError: the folder holds no whole model of ours.
        StorageError: the host's memory, or its disk, has no room either.
    """
    if plan.offload == "cpu" and plan.on_device == 0:
        # Nothing stays on the device: each layer comes when it computes, and goes again.
        model = load_model(folder, dtype=dtype)
        cpu_offload(model, device)
        return model
    waiting = Path(tempfile.mkdtemp(prefix="mm-interleaved-weights-"))
    try:
        model = load_model(
            folder,
            dtype=dtype,
            device_map="auto",
            max_memory=_most_memory(device, plan),
            offload_folder=str(waiting),
        )
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, waiting, ignore_errors=True)
    return model


def _most_memory(device: torch.device, plan: MemoryPlan) -> dict[Any, int]:
    """Bytes of weights on each place, as accelerate takes them; the disk takes what is left."""
    if device.type == "cpu":
        return {"cpu": plan.on_device}
    place = device.type if device.type == "mps" else device.index or 0
    return {place: plan.on_device, "cpu": plan.on_host}
