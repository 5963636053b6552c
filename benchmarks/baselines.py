"""What ours is compared with: the textbook; on a GPU also compiled, and with the best public sampler."""

from typing import Any

import torch

from benchmarks.deformops_sampler import deformops_sampling, has_deformops
from benchmarks.harness import Setting
from benchmarks.textbook import TextbookGate
from mm_interleaved.models.synchronizer import GatedSynchronizer

COMPILED_IMAGES = 8
"""Compiling takes half a minute for each shape: it is done for one number of images."""


def baselines(setting: Setting, layer: GatedSynchronizer, images: int) -> dict[str, Any]:
    """Modules by name, the plain textbook first; each stands where `layer` stands."""
    sides: dict[str, Any] = {"textbook": TextbookGate(layer)}
    if setting.is_gpu and images == COMPILED_IMAGES:
        sides["textbook, compiled"] = torch.compile(TextbookGate(layer))
    if setting.is_gpu and has_deformops():
        sides["textbook, deformops"] = TextbookGate(layer, deformops_sampling)
    return sides
