"""What a GPU would take at least, computed from shapes: a table of what nobody has measured.

Least times are the greater of operations and bytes at assumed rates; nothing is run, and no model is made but
on the meta device. Prints Markdown, as docs/performance_results.md has it.
"""

from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.cost import (
    Cost,
    given_places_cost,
    projected_cost,
    sampling_bytes,
    sampling_flops,
    textbook_cost,
)
from benchmarks.decode_token import token_cost
from benchmarks.machine import Rates
from benchmarks.models import unet_settings, writer_config
from benchmarks.sizes import LANGUAGE, SynchronizerSize, causal_visibility, unet_map
from benchmarks.unet_step import PUBLISHED, published_counts
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

ASSUMED = Rates(bytes_a_second=4.3e12, flops_a_second=790e12)
"""Of one H200: what a large copy and a large product of bfloat16 reach there."""
HALF, SINGLE = 2, 4
"""Bytes a number: weights, values and results; offsets and logits."""
TOKENS, IMAGES = 2048, 8
CONTEXT = 1024
IMAGE_STEPS = 30
AT_ONCE = 8
"""Documents continued at once."""
FORWARD, BACKWARD = 1, 2
"""Backward computes twice what forward does: for the inputs and for the weights."""


def report() -> str:
    """The table, in Markdown."""
    lines = [
        f"Computed for {ASSUMED.bytes_a_second / 1e12:.1f} TB/s and {ASSUMED.flops_a_second / 1e12:.0f}"
        " TFLOP/s (bfloat16).",
        "",
        "| what | the other side: GFLOP, GB, least time | ours | ratio of operations, of bytes |",
        "| --- | --- | --- | --- |",
    ]
    [token] = _token()
    lines += [_row(*row) for row in (*_layer(), token, *_sampling(), *_image(), *_batch())]
    a_second = 1 / token[-1].seconds(ASSUMED.flops_a_second, ASSUMED.bytes_a_second)
    lines += [
        "",
        f"At that bandwidth ours writes {a_second:.0f} tokens a second, at 80 % of it {0.8 * a_second:.0f}.",
    ]
    return "\n".join(lines)


Row = tuple[str, Cost, Cost]
"""What, the side that is compared with, ours."""


def _layer() -> list[Row]:
    pairs = int(causal_visibility(TOKENS, IMAGES, torch.device("cpu")).sum())
    theirs = textbook_cost(LANGUAGE, TOKENS, IMAGES, 1, HALF)
    ours = projected_cost(LANGUAGE, TOKENS, pairs, IMAGES, HALF)
    both = FORWARD + BACKWARD
    what = f"{TOKENS} tokens, {IMAGES} images"
    return [
        (f"prefill, one layer, {what}", theirs, ours),
        (
            f"training, the same, forward and backward ({both} times as much)",
            _times(theirs, both),
            _times(ours, both),
        ),
    ]


def _token() -> list[Row]:
    none, some = (_token_cost(images) for images in (0, IMAGES))
    attending = _times(textbook_cost(LANGUAGE, 1, IMAGES, 1, HALF), _synchronized_layers())
    # Its synchronizers in the place of a constant, which is nothing beside them.
    theirs = Cost(none.flops + attending.flops, none.bytes + attending.bytes)
    return [(f"a token of 13 B behind {CONTEXT} tokens, {IMAGES} images", theirs, some)]


def _batch() -> list[Row]:
    """Several documents one after another (the other side), and at once: weights are read once for all."""
    token, weights = _token_cost(IMAGES), _token_cost(0, context=0)
    tokens = Cost(AT_ONCE * token.flops, AT_ONCE * token.bytes - (AT_ONCE - 1) * weights.bytes)
    step = _image()[0][-1]
    channels, sample_size, value_dim = PUBLISHED
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_settings(channels, sample_size, value_dim))
    unet_bytes = HALF * sum(weight.numel() for weight in unet.parameters())
    alone = Cost(step.flops, step.bytes + unet_bytes)
    steps = Cost(AT_ONCE * alone.flops, AT_ONCE * alone.bytes - (AT_ONCE - 1) * unet_bytes)
    return [
        (f"a token of each of {AT_ONCE} documents: one by one; at once", _times(token, AT_ONCE), tokens),
        (f"a guided U-Net step of {AT_ONCE} images: one by one; at once", _times(alone, AT_ONCE), steps),
    ]


@cache
def _writer() -> Any:
    config = writer_config(
        hidden=5120,
        layers=40,
        intermediate=13824,
        heads=40,
        vocabulary=32002,
        value_dim=1024,
        vision_dim=1024,
    )
    with torch.device("meta"):
        model: Any = MMInterleavedForConditionalGeneration(config)
    return model.to(torch.bfloat16)


def _synchronized_layers() -> int:
    return len(_writer().language_model.synchronized_layers)


def _token_cost(images: int, context: int = CONTEXT) -> Cost:
    return token_cost(_writer(), LANGUAGE, context, images)


def _sampling() -> list[Row]:
    """Beside a sampler that is given all places and weights, as deformops is."""
    pairs = int(causal_visibility(TOKENS, IMAGES, torch.device("cpu")).sum())
    grid = 64
    cases = (
        (
            f"the sampling alone, {TOKENS} tokens, {IMAGES} images; given places",
            LANGUAGE,
            TOKENS,
            IMAGES,
            pairs,
        ),
        (f"the same, U-Net map of {grid} x {grid}", unet_map(320, grid), grid**2, 1, grid**2),
    )
    return [
        (what, given_places_cost(size, queries, images, HALF), _ours_sampling(size, queries, images, seen))
        for what, size, queries, images, seen in cases
    ]


def _ours_sampling(size: SynchronizerSize, queries: int, images: int, pairs: int) -> Cost:
    return Cost(sampling_flops(size, pairs), sampling_bytes(size, queries, pairs, images, HALF, SINGLE))


def _image() -> list[Row]:
    counted = published_counts(1)
    flops, moved = counted["flops"], counted["bytes"]
    # Counted for a model in single precision.
    steps = {
        side: Cost(
            flops["unet"] + flops[f"{side} synchronizers"], HALF / SINGLE * moved[f"{side} synchronizers"]
        )
        for side in ("textbook", "our")
    }
    return [
        ("a guided U-Net step after one image (bytes: synchronizers alone)", steps["textbook"], steps["our"]),
        (
            f"an image of {IMAGE_STEPS} steps",
            _times(steps["textbook"], IMAGE_STEPS),
            _times(steps["our"], IMAGE_STEPS),
        ),
    ]


def _times(cost: Cost, count: int) -> Cost:
    return Cost(count * cost.flops, count * cost.bytes)


def _row(what: str, theirs: Cost, ours: Cost) -> str:
    ratios = f"{theirs.flops / ours.flops:.1f}, {theirs.bytes / ours.bytes:.1f}"
    return f"| {what} | {_side(theirs)} | {_side(ours)} | {ratios} |"


def _side(cost: Cost) -> str:
    least = 1e3 * cost.seconds(ASSUMED.flops_a_second, ASSUMED.bytes_a_second)
    return f"{cost.flops / 1e9:.4g}, {cost.bytes / 1e9:.3g}, {least:.3g} ms"
