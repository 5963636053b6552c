"""One layer's synchronizer forward and backward: time, and what it keeps for the backward pass.

Folding two projections into one costs as much as so many queries save as there are terms (640): ours does it
beyond that. Beside it stand both ways at half, once and twice that number, with one image.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Rung, baselines, folded_now, once_a_query
from benchmarks.cost import projected_cost, textbook_cost
from benchmarks.harness import Case, Setting, compare, exact_first, saved_for_backward
from benchmarks.prefill_mmfs import visibility
from benchmarks.sizes import LANGUAGE, SynchronizerSize, gated_synchronizer
from mm_interleaved.tokens.visibility import relative_image_index

GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 0.8, torch.float16: 0.8}

AROUND = (320, 640, 1280)
"""Tokens on both sides of the number from which folding pays."""


def run(setting: Setting) -> Iterator[Case]:
    sizes: tuple[tuple[int, int], ...] = ((512, 8),)
    if setting.is_gpu and not setting.quick:
        sizes = ((512, 4), (1024, 8), (2048, 8), (2048, 30))
    if not setting.quick:
        sizes = (*((tokens, 1) for tokens in AROUND), *sizes)
    for tokens, images in sizes:
        yield exact_first(setting, partial(train_case, size=LANGUAGE, tokens=tokens, images=images))


def train_case(setting: Setting, size: SynchronizerSize, tokens: int, images: int) -> Case:
    """Causal, one row; gradients of every weight, of the hidden states and of the features."""
    device, dtype = setting.device, setting.dtype
    layer = gated_synchronizer(size, device, dtype).train()
    generator = torch.Generator(device).manual_seed(tokens + images)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    cells = normal(1, images, size.cells, size.feature_dim).requires_grad_()
    hidden = normal(1, tokens, size.query_dim).requires_grad_()
    outward = normal(1, tokens, size.query_dim)
    visible = visibility(tokens, images, 1, device)
    index = relative_image_index(visible)
    weights = [each for each in layer.parameters() if each.requires_grad]

    def forward(side: Any) -> Tensor:
        return side(hidden, side.project_cells(cells, size.level_sizes), index)

    def step(side: Any) -> tuple[Tensor, ...]:
        out = forward(side)
        return out.detach(), *torch.autograd.grad(out, (hidden, cells, *weights), outward)

    each = {
        **baselines(setting, layer, images),
        "once a query": Rung(layer, once_a_query, False),
        "folded": Rung(layer, folded_now, False),
        "ours": layer,
    }
    sides = {name: lambda side=side: step(side) for name, side in each.items()}
    result = compare(setting, sides, tolerance=GRADIENT_TOLERANCE[dtype], measure="norm")
    saved = {}
    for name, side in each.items():
        with saved_for_backward((cells, hidden, *layer.parameters())) as counted:
            forward(side)
        saved[name] = counted["bytes"]

    pairs = int(visible.sum())
    theirs = textbook_cost(size, tokens, images, 1, dtype.itemsize).flops
    # Forward once; backward twice, once for the inputs and once for the weights.
    ours = projected_cost(size, tokens, pairs, images, dtype.itemsize).flops
    return {
        "tokens": tokens,
        "images": images,
        **result.record("ours"),
        "ratios": {name: result.ratio(name) for name in result.median},
        "model_ratio": theirs / ours,
        "flops": {"textbook": 3 * theirs, "ours": 3 * ours},
        "saved_bytes": saved,
        "saved_ratio": saved["textbook"] / saved["ours"],
    }
