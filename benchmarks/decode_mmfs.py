"""One layer's synchronizer for one new word: the textbook projects all images again, ours looks them up.

Three copies of the layer take turns, so that neither side finds its weights in a cache.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.baselines import baselines
from benchmarks.cost import cached_cost, textbook_cost
from benchmarks.harness import Case, Run, Setting, compare, exact_first, in_turn, wait
from benchmarks.machine import rates
from benchmarks.sizes import LANGUAGE, SynchronizerSize, gated_synchronizer

COPIES = 3


def run(setting: Setting) -> Iterator[Case]:
    images = (1, 8, 32) if setting.quick else (1, 4, 8, 16, 32)
    cases = [(count, 1, 1) for count in images]
    if not setting.quick:
        # Rows of one batch have images of their own; beams of one row share them.
        cases += [(8, 8, 1), (8, 1, 5)]
    for count, batch, beams in cases:
        case = partial(decode_case, size=LANGUAGE, num_images=count, batch=batch, beams=beams)
        yield exact_first(setting, case)


@torch.inference_mode()
def decode_case(
    setting: Setting, size: SynchronizerSize, num_images: int, *, batch: int, beams: int = 1
) -> Case:
    """One query a row and beam, all images visible."""
    device, dtype = setting.device, setting.dtype
    generator = torch.Generator(device).manual_seed(num_images)
    cells = torch.randn(
        batch, num_images, size.cells, size.feature_dim, generator=generator, device=device
    ).to(dtype)
    hidden = torch.randn(batch * beams, 1, size.query_dim, generator=generator, device=device).to(dtype)
    index = torch.arange(num_images, 0, -1, device=device).expand(batch * beams, 1, num_images)
    row = torch.arange(batch, device=device).repeat_interleave(beams)

    copies: dict[str, list[Run]] = {}
    for seed in range(COPIES):
        layer = gated_synchronizer(size, device, dtype, seed)
        for name, side in baselines(setting, layer, num_images).items():
            kept = side.project_cells(cells, size.level_sizes)
            # The released code repeats the features for each beam; ours are shared.
            repeated = kept._replace(value=kept.value[row]) if beams > 1 else kept
            copies.setdefault(name, []).append(lambda side=side, values=repeated: side(hidden, values, index))
        image = torch.arange(batch * num_images, device=device).view(batch, num_images)[row]
        for keep, name in (("values", "ours"), ("features", "sample first")):
            layer.synchronizer.keep = keep
            values = layer.project_cells(cells, size.level_sizes)._replace(image_BN=image)
            copies.setdefault(name, []).append(
                lambda layer=layer, values=values: layer(hidden, values, index)
            )
    # The first word after new images multiplies the weights that are folded; it is timed by itself.
    begin = time.perf_counter()
    for each in copies["ours"]:
        each()
    wait(device)
    folding = (time.perf_counter() - begin) / COPIES
    for each in copies["sample first"]:
        each()
    result = compare(setting, {name: in_turn(runs) for name, runs in copies.items()})

    width = dtype.itemsize
    costs = (
        textbook_cost(size, 1, num_images, batch * beams, width),
        cached_cost(size, 1, num_images, batch * beams, width),
    )
    rate = rates(device, dtype)
    limit = costs[1].seconds(rate.flops_a_second, rate.bytes_a_second)
    return {
        "images": num_images,
        "batch": batch,
        "beams": beams,
        "query_dim": size.query_dim,
        **result.record("ours"),
        "first_word_seconds": folding,
        "model_ratio": costs[0].flops / costs[1].flops,
        "model_ratio_bytes": costs[0].bytes / costs[1].bytes,
        "flops": {"textbook": costs[0].flops, "ours": costs[1].flops},
        "bytes": {"textbook": costs[0].bytes, "ours": costs[1].bytes},
        "share_of_limit": limit / result.median["ours"] if result.equal else None,
    }
