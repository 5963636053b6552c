"""One token of a whole language model behind a filled cache: what images add to it, and the memory's limit.

The limit is the time to read all weights and all keys and values once, at the bandwidth of a large copy
measured in the same run. Beside the growing cache stand the static one and, on a GPU, the static one in
compiled code; then several documents of unequal length, one by one and in one pass.
On a CPU the full size is one group of layers of the published language model: those between two that attend
to images, and one of these. What images add to it is what they add to the whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import COMPILED_IMAGES
from benchmarks.cost import Cost, cached_cost
from benchmarks.harness import Case, Run, Setting, compare, compiled
from benchmarks.machine import Rates, rates
from benchmarks.models import IMAGE_SIZE, random_model, writer_config
from benchmarks.sizes import LANGUAGE, SynchronizerSize
from benchmarks.textbook import textbook_layers
from mm_interleaved.generation.text_batch import join_caches
from mm_interleaved.models.prefix_cache import PrefixCache

ROWS = 4
"""Documents of the batch."""
SHORTER = 7
"""Tokens by which each document of the batch is shorter than the one before."""
COMPILING_SECONDS = 90
"""Without so much time left, no further shape is compiled."""


def run(setting: Setting) -> Iterator[Case]:
    images = (0, 8, 32)
    published = {"hidden": 5120, "intermediate": 13824, "heads": 40, "value_dim": 1024, "vision_dim": 1024}
    if not setting.is_gpu and not setting.quick:
        config = writer_config(layers=4, **published)
        model = random_model(config, setting.device, setting.dtype)
        yield from group_cases(setting, model, LANGUAGE, 512, images)
        return
    if setting.is_gpu and not setting.quick:
        config = writer_config(layers=40, vocabulary=32002, **published)
        contexts = (512, 2048)
    else:
        config = writer_config(hidden=1024, layers=8, intermediate=2752, heads=8, vision_dim=512)
        contexts = (128,)
    model = random_model(config, setting.device, setting.dtype)
    for context in contexts:
        # What images add is asked of compiled code in one context; in the others one number of them does.
        shapes = images if context == contexts[0] else (COMPILED_IMAGES,)
        yield from token_cases(setting, model, context, images, shapes if setting.compiles else ())
        yield batch_case(setting, model, context, images[1])


@torch.inference_mode()
def token_cases(
    setting: Setting,
    model: Any,
    context: int,
    images: Sequence[int],
    compiled_images: Sequence[int] = (),
) -> Iterator[Case]:
    """All numbers of images in turns, so that their growth is measured at one time.

    Args:
        compiled_images: the numbers for which compiled code stands beside it. It is compiled once for each:
            a shape of its own.
    """
    ours = {count: stepper(model, context, count) for count in images}
    for count in images:
        also: dict[str, Run] = {f"ours, {other} images": ours[other] for other in images if other != count}
        theirs = textbook_stepper(model, context, count) if count else ours[count]
        sides = {
            "textbook": theirs,
            "ours": ours[count],
            "static": stepper(model, context, count, room=context + 1),
        }
        if count in compiled_images and setting.has(COMPILING_SECONDS):
            sides["compiled"] = stepper(
                model, context, count, room=context + 1, forward=compiled_pass(setting, model)
            )
        if count == COMPILED_IMAGES and count in compiled_images and setting.has(2 * COMPILING_SECONDS):
            sides["textbook, compiled"] = textbook_stepper(
                model, context, count, room=context + 1, forward=compiled(model.__call__)
            )
        result = compare(setting, sides, also=also)
        if not result.equal:
            yield {"images": count, "context": context, **result.record("ours")}
            continue
        read = _bytes_a_token(model, context)
        bandwidth = rates(setting.device, setting.dtype).bytes_a_second
        none = result.median["ours"] if count == 0 else result.median["ours, 0 images"]
        yield {
            "images": count,
            "context": context,
            "parameters": sum(each.numel() for each in model.language_model.parameters()),
            **result.record("ours"),
            "growth_from_no_image": {
                "textbook": result.median["textbook"] / none - 1,
                "ours": result.median["ours"] / none - 1,
            },
            "ratios": {name: result.ratio(name) for name in sides},
            "tokens_a_second": 1 / min(result.median[name] for name in sides),
            "bytes": {"ours": read},
            "share_of_limit": read / bandwidth / min(result.median[name] for name in sides),
        }


@torch.inference_mode()
def group_cases(
    setting: Setting, model: Any, size: SynchronizerSize, context: int, images: Sequence[int]
) -> Iterator[Case]:
    """What images add to a token, measured and counted; the textbook beside it in few turns, as it is slow.

    Keys and values are random, not computed: reading a prompt would take longer than all else.

    Args:
        size: of its synchronizers, to count what they cost.
        images: the first is none, 0.
    """
    ours = {count: stepper(model, context, count, fill=random_cache) for count in images}
    # 1. The growth, in turns of one comparison; each side has outputs of its own.
    also: dict[str, Run] = {_so_many(count): ours[count] for count in images[1:]}
    # A hundredth has to show: turns enough, also where they are slow.
    patient = replace(setting, patience=3 * setting.patience)
    together = compare(patient, {_so_many(0): ours[0]}, also=also)
    rate = rates(setting.device, setting.dtype)
    # 2. Each against the textbook.
    brief = replace(setting, least=1, patience=0.0, seconds=0.0)
    for count in images:
        theirs = textbook_stepper(model, context, count, fill=random_cache) if count else ours[count]
        result = compare(brief, {"textbook": theirs, "ours": ours[count]})
        name = _so_many(count)
        case = {"images": count, "context": context, **result.record("ours")}
        if result.equal:
            read = _bytes_a_token(model, context)
            case |= {
                "layers": model.config.text_config.num_hidden_layers,
                "parameters": sum(each.numel() for each in model.language_model.layers.parameters()),
                "seconds": {"textbook": result.median["textbook"], "ours": together.median[name]},
                "growth_from_no_image": _growth(together.median, name),
                "growth_of_minima": _growth(together.least, name),
                "growth_counted": counted_growth(model, size, context, count, rate),
                "growth_runs": together.runs,
                "bytes": {"ours": read},
                "share_of_limit": read / rate.bytes_a_second / together.median[name],
            }
        yield case


def counted_growth(
    model: Any, size: SynchronizerSize, context: int, images: int, rate: Rates
) -> dict[str, float]:
    """What images add to the operations and to the bytes of a token, as shares, and to its least time."""
    none, some = (token_cost(model, size, context, count) for count in (0, images))
    least = [cost.seconds(rate.flops_a_second, rate.bytes_a_second) for cost in (some, none)]
    return {
        "flops": some.flops / none.flops - 1,
        "bytes": some.bytes / none.bytes - 1,
        "least_time": least[0] / least[1] - 1,
    }


def token_cost(model: Any, size: SynchronizerSize, context: int, images: int) -> Cost:
    """Of one token behind so many others: what all weights, keys, values and images cost.

    Without an image, a layer that attends to images adds its constant: one matrix, read and multiplied.
    """
    text, width = model.config.text_config, model.dtype.itemsize
    groups = len(model.language_model.synchronized_layers)
    parts = (*model.language_model.layers.named_parameters(), *model.text_head.named_parameters())
    stock = sum(each.numel() for name, each in parts if "synchronizer" not in name)
    constant = groups * size.value_dim * size.query_dim
    cached = 2 * text.num_hidden_layers * text.hidden_size * context
    none = Cost(2.0 * (stock + constant + cached), width * (stock + constant + cached))
    if not images:
        return none
    attending = cached_cost(size, 1, images, 1, width)
    return Cost(
        none.flops + groups * attending.flops - 2.0 * constant,
        none.bytes + groups * attending.bytes - width * constant,
    )


def _growth(seconds: dict[str, float], name: str) -> float:
    return seconds[name] / seconds[_so_many(0)] - 1


def _so_many(images: int) -> str:
    return f"ours, {images} images"


@torch.inference_mode()
def batch_case(setting: Setting, model: Any, context: int, images: int) -> Case:
    """A token of each of several documents, all with images and of unequal length."""
    lengths = [context - SHORTER * row for row in range(ROWS)]
    caches = [filled_cache(model, length, images) for length in lengths]
    token_BTD = _normal(model, ROWS, 1, model.config.text_config.hidden_size)
    joined = join_caches(caches, model.config.text_config, context + 1)
    length_B = torch.tensor(lengths, device=model.device)
    place_T = torch.arange(context + 1, device=model.device)
    mask_BT = (place_T >= context - length_B[:, None]).long()

    def one_by_one() -> Tensor:
        rows = [
            model(inputs_embeds=token_BTD[row : row + 1], cache=cache).logits
            for row, cache in enumerate(caches)
        ]
        for cache in caches:
            cache.crop(-1)
        return torch.cat(rows)

    def together() -> Tensor:
        logits = model(
            inputs_embeds=token_BTD,
            attention_mask=mask_BT,
            position_ids=length_B[:, None],
            cache=joined,
        ).logits
        joined.crop(-1)
        return logits

    result = compare(setting, {"one by one": one_by_one, "together": together})
    return {"images": images, "context": context, "documents": ROWS, **result.record("together")}


def compiled_pass(setting: Setting, model: Any) -> Run:
    """A pass as transformers compiles it for a static cache: with CUDA graphs on a GPU."""
    return torch.compile(model.__call__, mode="reduce-overhead" if setting.is_gpu else None, fullgraph=True)


def stepper(
    model: Any,
    context: int,
    images: int,
    *,
    room: int | None = None,
    forward: Run | None = None,
    fill: Callable[..., PrefixCache] | None = None,
) -> Run:
    """One more token behind a cache; the cache is as before afterwards.

    Args:
        room: of a static cache.
        forward: the model's own where not given.
        fill: makes the cache, `filled_cache` where not given.
    """
    cache = (fill or filled_cache)(model, context, images, room)
    token = _normal(model, 1, 1, model.config.text_config.hidden_size)
    run: Run = forward or model.__call__
    # What compiled code takes from the pass before it.
    model(inputs_embeds=token, cache=cache, logits_to_keep=1)
    cache.crop(-1)
    if room is not None:
        cache.keep_addresses()

    def step() -> Tensor:
        logits = run(inputs_embeds=token, cache=cache, logits_to_keep=1).logits.clone()
        cache.crop(-1)
        return logits

    return step


def textbook_stepper(
    model: Any,
    context: int,
    images: int,
    *,
    room: int | None = None,
    forward: Run | None = None,
    fill: Callable[..., PrefixCache] | None = None,
) -> Run:
    """The same, with layers that attend to images as the textbook does."""
    with textbook_layers(model.language_model):
        step = stepper(model, context, images, room=room, forward=forward, fill=fill)

    def textbook_step() -> Tensor:
        with textbook_layers(model.language_model):
            return step()

    return textbook_step


def filled_cache(model: Any, context: int, images: int, room: int | None = None) -> PrefixCache:
    """Of random tokens, with images that began evenly among them; static with room for so many."""
    cache = _cache_of_images(model, context, images, room)
    # Written in pieces: the textbook repeats every query for each image.
    for first in range(0, context, 64):
        piece = _normal(model, 1, min(64, context - first), model.config.text_config.hidden_size, seed=first)
        model(inputs_embeds=piece, cache=cache, logits_to_keep=1)
    return cache


def random_cache(model: Any, context: int, images: int, room: int | None = None) -> PrefixCache:
    """The same with random keys and values, which costs no pass."""
    cache, text = _cache_of_images(model, context, images, room), model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    for index in range(text.num_hidden_layers):
        keys, values = (
            _normal(model, 1, text.num_key_value_heads, context, head_dim, seed=2 * index + part)
            for part in range(2)
        )
        cache.update(keys, values, index)
    cache.append_hidden(_normal(model, 1, context, text.hidden_size))
    return cache


def _cache_of_images(model: Any, context: int, images: int, room: int | None) -> PrefixCache:
    cache = PrefixCache(model.config.text_config, device=model.device, max_cache_len=room)
    if images:
        generator = torch.Generator().manual_seed(images)
        pixels = torch.rand(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        start = torch.arange(images, device=model.device)[None] * context // images
        features = model.encode_images(pixels.to(model.device, model.dtype))
        cache.append_images(start, model.values_by_row(features.pyramid, start))
    return cache


def _normal(model: Any, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(model.device, model.dtype)


def _bytes_a_token(model: Any, context: int) -> int:
    """Weights of the layers and of the head, and the keys and values of all tokens.

    What folded projections save is left in: this is the model as it is stored.
    """
    text = model.config.text_config
    weights = sum(
        each.numel() for each in (*model.language_model.layers.parameters(), *model.text_head.parameters())
    )
    unused = sum(
        each.numel()
        for name, each in model.language_model.layers.named_parameters()
        if "query_projection.weight" in name or "value_projection" in name
    )
    cached = 2 * text.num_hidden_layers * text.hidden_size * context
    return (weights - unused + cached) * model.dtype.itemsize
