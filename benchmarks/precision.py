"""How far float32, bfloat16 and float16 are from float64: the textbook's rounding beside ours.

The same weights and inputs, rounded once, on both sides; places and softmax of ours stay in float32.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost import Cost, projected_cost, textbook_cost
from benchmarks.harness import Case, Setting, peak_bytes
from benchmarks.sizes import (
    LANGUAGE,
    SynchronizerSize,
    causal_visibility,
    feature_synchronizer,
    gated_synchronizer,
    random_module,
    unet_map,
)
from benchmarks.textbook import TextbookGate, TextbookMap
from mm_interleaved.models.unet import MapSynchronizer
from mm_interleaved.tokens.visibility import relative_image_index

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = 1e-11


def run(setting: Setting) -> Iterator[Case]:
    tokens = 64 if setting.quick else 2048 if setting.is_gpu else 128
    yield from language_cases(setting, LANGUAGE, tokens, images=4)
    grids = (
        ((320, 32),)
        if setting.quick
        else ((320, 64), (640, 32), (1280, 8))
        if setting.is_gpu
        else ((320, 32), (1280, 8))
    )
    for channels, grid in grids:
        yield from map_cases(setting, unet_map(channels, grid), grid)


@torch.inference_mode()
def language_cases(setting: Setting, size: SynchronizerSize, tokens: int, images: int) -> Iterator[Case]:
    """Causal queries over smooth features."""
    generator = torch.Generator(setting.device).manual_seed(0)
    layer = gated_synchronizer(size, setting.device, torch.float64)
    cells = smooth_cells(size, images, generator)
    hidden = torch.randn(
        1, tokens, size.query_dim, generator=generator, device=setting.device, dtype=torch.float64
    )
    index = relative_image_index(causal_visibility(tokens, images, setting.device))

    def theirs(module: Any, dtype: torch.dtype) -> Tensor:
        side = TextbookGate(module)
        return side(hidden.to(dtype), side.project_cells(cells.to(dtype), size.level_sizes), index)

    def ours(module: Any, dtype: torch.dtype) -> Tensor:
        return module(hidden.to(dtype), module.project_cells(cells.to(dtype), size.level_sizes), index)

    def costs(width: int) -> dict[str, Cost]:
        pairs = int((index > 0).sum())
        return {
            "textbook": textbook_cost(size, tokens, images, 1, width),
            "ours": projected_cost(size, tokens, pairs, images, width),
        }

    yield from _errors({"kind": "language", "tokens": tokens, "images": images}, layer, theirs, ours, costs)


@torch.inference_mode()
def map_cases(setting: Setting, size: SynchronizerSize, grid: int) -> Iterator[Case]:
    """The pixels of one map over the smooth features of one image."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def build() -> MapSynchronizer:
        return MapSynchronizer(feature_synchronizer(size), size.query_dim, size.feature_dim, grid_size=grid)

    layer = random_module(build, setting.device, torch.float64)
    cells = smooth_cells(size, 1, generator)
    pixels = torch.randn(
        1, size.query_dim, grid, grid, generator=generator, device=setting.device, dtype=torch.float64
    )
    index = torch.ones(1, 1, dtype=torch.int64, device=setting.device)

    def theirs(module: Any, dtype: torch.dtype) -> Tensor:
        return TextbookMap(module)(pixels.to(dtype), cells.to(dtype), index > 0, size.level_sizes)

    def ours(module: Any, dtype: torch.dtype) -> Tensor:
        return module(pixels.to(dtype), module.project_cells(cells.to(dtype), size.level_sizes), index)

    def costs(width: int) -> dict[str, Cost]:
        theirs = textbook_cost(size, grid * grid, 1, 1, width)
        # A 1 x 1 convolution comes after it; ours folds it into the projection.
        after = Cost(
            2.0 * grid**2 * size.query_dim**2, width * size.query_dim * (size.query_dim + 2 * grid**2)
        )
        return {
            "textbook": Cost(theirs.flops + after.flops, theirs.bytes + after.bytes),
            "ours": projected_cost(size, grid * grid, grid * grid, 1, width),
        }

    yield from _errors({"kind": "unet", "channels": size.query_dim, "grid": grid}, layer, theirs, ours, costs)


def smooth_cells(size: SynchronizerSize, images: int, generator: torch.Generator) -> Tensor:
    """Features as images have them: neighbours are alike. (1, N, S, C), float64, deviation one."""
    levels = []
    for side in size.level_sizes:
        coarse = torch.randn(
            images, size.feature_dim, 6, 6, generator=generator, device=generator.device, dtype=torch.float64
        )
        fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
        levels.append(fine.flatten(2).transpose(1, 2))
    cells = torch.cat(levels, dim=1)[None]
    return cells / cells.std()


def _errors(
    sizes: Case,
    layer: torch.nn.Module,
    theirs: Callable[[Any, torch.dtype], Tensor],
    ours: Callable[[Any, torch.dtype], Tensor],
    costs: Callable[[int], dict[str, Cost]],
) -> Iterator[Case]:
    """Root mean square error as a share of the root mean square; both sides must agree in float64.

    Args:
        costs: of both sides, with numbers of so many bytes.
    """
    exact = theirs(layer, torch.float64)
    scale = exact.square().mean().sqrt()
    disagreement = ((ours(layer, torch.float64) - exact).abs().max() / exact.abs().max()).item()
    for dtype in DTYPES:
        rounded = copy.deepcopy(layer).to(dtype)
        error, peaks = {}, {}
        for name, side in (("textbook", theirs), ("ours", ours)):
            with peak_bytes(exact.device) as peak:
                found = side(rounded, dtype)
            error[name] = ((found.double() - exact).square().mean().sqrt() / scale).item()
            peaks[name] = peak["bytes"]
        models = costs(dtype.itemsize)
        yield {
            **sizes,
            "dtype": str(dtype).removeprefix("torch."),
            "rms_error_textbook": error["textbook"],
            "rms_error_ours": error["ours"],
            "ratio": error["textbook"] / error["ours"],
            "equal": disagreement < EXACT,
            "difference_in_float64": disagreement,
            "flops": {name: cost.flops for name, cost in models.items()},
            "bytes": {name: cost.bytes for name, cost in models.items()},
            "peak_bytes": peaks,
        }
