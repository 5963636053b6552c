"""One layer's synchronizer over a whole prompt: causal rows, and rows of several documents.

The values are projected within the call on all sides: a prompt's images are new. What is folded of the
weights is there from the round before; beside it stand a session's first prompt, and one whose images are
known already. Between the textbook and ours stand the steps to it: projections once a query, then folded;
ours leaves out the hidden pairs as well.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import Rung, baselines, fold, folded_before, once_a_query
from benchmarks.cost import projected_cost, textbook_cost
from benchmarks.harness import Case, Run, Setting, compare, exact_first
from benchmarks.machine import rates
from benchmarks.sizes import (
    LANGUAGE,
    SynchronizerSize,
    causal_visibility,
    gated_synchronizer,
    packed_visibility,
)
from mm_interleaved.tokens.visibility import relative_image_index

DOCUMENTS = 4
"""Of a packed row."""


def run(setting: Setting) -> Iterator[Case]:
    if setting.quick:
        sizes = ((256, 4, 1), (512, 8, 1))
    elif setting.is_gpu:
        sizes = ((512, 4, 1), (2048, 1, 1), (2048, 8, 1), (2048, 8, DOCUMENTS), (2048, 30, 1))
    else:
        sizes = ((256, 4, 1), (512, 4, 1), (512, 8, 1), (512, 8, DOCUMENTS))
    for tokens, images, documents in sizes:
        case = partial(prefill_case, size=LANGUAGE, tokens=tokens, images=images, documents=documents)
        yield exact_first(setting, case)


def visibility(tokens: int, images: int, documents: int, device: torch.device) -> Tensor:
    """Of one row: (1, Q, N) bool."""
    if documents == 1:
        return causal_visibility(tokens, images, device)
    return packed_visibility(tokens, images, documents, device)


@torch.inference_mode()
def prefill_case(setting: Setting, size: SynchronizerSize, tokens: int, images: int, documents: int) -> Case:
    """One row of tokens with its images spread evenly."""
    device, dtype = setting.device, setting.dtype
    layer = gated_synchronizer(size, device, dtype)
    generator = torch.Generator(device).manual_seed(tokens + images)
    cells = torch.randn(1, images, size.cells, size.feature_dim, generator=generator, device=device).to(dtype)
    hidden = torch.randn(1, tokens, size.query_dim, generator=generator, device=device).to(dtype)
    visible = visibility(tokens, images, documents, device)
    index = relative_image_index(visible)
    sides: dict[str, Run] = {
        name: lambda side=side: side(hidden, side.project_cells(cells, size.level_sizes), index)
        for name, side in baselines(setting, layer, images).items()
    }
    folded = folded_before(fold(layer))
    ladder = {"once a query": Rung(layer, once_a_query, True), "folded": Rung(layer, folded, True)}
    for name, rung in ladder.items():
        sides[name] = lambda rung=rung: rung(hidden, rung.project_cells(cells, size.level_sizes), index)
    known = layer.project_cells(cells, size.level_sizes)

    def ours() -> Tensor:
        values = layer.project_cells(cells, size.level_sizes)
        return layer(hidden, values._replace(folded=known.folded), index)

    sides["ours"] = ours
    sides["ours, first prompt"] = lambda: layer(hidden, layer.project_cells(cells, size.level_sizes), index)
    sides["ours, known images"] = lambda: layer(hidden, known, index)
    result = compare(setting, sides)

    pairs, width = int(visible.sum()), dtype.itemsize
    theirs = textbook_cost(size, tokens, images, 1, width)
    least = projected_cost(size, tokens, pairs, images, width)
    rate = rates(device, dtype)
    limit = least.seconds(rate.flops_a_second, rate.bytes_a_second)
    return {
        "tokens": tokens,
        "images": images,
        "documents": documents,
        "pairs": pairs,
        **result.record("ours"),
        "ratios": {name: result.ratio(name) for name in result.median},
        "model_ratio": theirs.flops / least.flops,
        "flops": {"textbook": theirs.flops, "ours": least.flops},
        "bytes": {"textbook": theirs.bytes, "ours": least.bytes},
        "share_of_limit": limit / result.median["ours"] if result.equal else None,
    }
