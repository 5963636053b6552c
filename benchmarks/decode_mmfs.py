"""One layer's synchronizer for one new token: the textbook projects all images again, ours keeps their
values.

Beside the values that are kept for the layer stand two ways to keep features alone: sampled and then
projected, or all weighed by one matrix. Three copies of the layer take turns, so that neither side finds its
weights in a cache.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.baselines import DenseGate, baselines
from benchmarks.cost import cached_cost, dense_cost, sample_first_cost, textbook_cost
from benchmarks.harness import Case, Run, Setting, compare, exact_first, in_turn, wait
from benchmarks.machine import rates
from benchmarks.sizes import LANGUAGE, SynchronizerSize, gated_synchronizer
from mm_interleaved.models.norms import normalize

COPIES = 3


def run(setting: Setting) -> Iterator[Case]:
    images = (1, 8, 32) if setting.quick else (1, 4, 8, 16, 32, 48)
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
    features = None
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
        # Without the norm's scale they are the same for all copies.
        features = normalize(layer.feature_norm, cells) if features is None else features
        copies.setdefault("dense", []).append(
            partial(DenseGate(layer), hidden, features, index, size.level_sizes)
        )
    # The first token after new images multiplies the weights that are folded; it is timed by itself.
    begin = time.perf_counter()
    for each in copies["ours"]:
        each()
    wait(device)
    folding = (time.perf_counter() - begin) / COPIES
    for each in copies["sample first"]:
        each()
    result = compare(setting, {name: in_turn(runs) for name, runs in copies.items()})

    width, rows = dtype.itemsize, batch * beams
    costs = {
        "textbook": textbook_cost(size, 1, num_images, rows, width),
        "ours": cached_cost(size, 1, num_images, rows, width),
        "sample first": sample_first_cost(size, num_images, rows, width),
        "dense": dense_cost(size, num_images, rows, batch, width),
    }
    rate = rates(device, dtype)
    limit = costs["ours"].seconds(rate.flops_a_second, rate.bytes_a_second)
    return {
        "images": num_images,
        "batch": batch,
        "beams": beams,
        "query_dim": size.query_dim,
        **result.record("ours"),
        "ratios": {name: result.ratio(name) for name in result.median},
        "first_word_seconds": folding,
        "model_ratio": costs["textbook"].flops / costs["ours"].flops,
        "model_ratio_bytes": costs["textbook"].bytes / costs["ours"].bytes,
        "flops": {name: cost.flops for name, cost in costs.items()},
        "bytes": {name: cost.bytes for name, cost in costs.items()},
        "share_of_limit": limit / result.median["ours"] if result.equal else None,
    }
