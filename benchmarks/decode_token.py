"""One word of a whole language model behind a filled cache: what images add to it, and the memory's limit.

The limit is the time to read all weights and all keys and values once, at the bandwidth of a large copy
measured in the same run. Beside the growing cache stand the static one and, on a GPU, the static one in
compiled code; then several documents of unequal length, one by one and in one pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Run, Setting, compare
from benchmarks.machine import rates
from benchmarks.models import IMAGE_SIZE, random_model, writer_config
from benchmarks.textbook import textbook_layers
from mm_interleaved.generation.batched import side_by_side
from mm_interleaved.models.prefix_cache import PrefixCache

ROWS = 4
"""Documents of the batch."""
SHORTER = 7
"""Tokens by which each document of the batch is shorter than the one before."""


def run(setting: Setting) -> Iterator[Case]:
    images = (0, 8, 32)
    if setting.is_gpu:
        config = writer_config(
            hidden=5120, layers=40, intermediate=13824, heads=40, value_dim=1024, vision_dim=1024,
            vocabulary=32002,
        )  # fmt: skip
        contexts = (512,) if setting.quick else (512, 2048)
    elif setting.quick:
        config = writer_config(hidden=1024, layers=8, intermediate=2752, heads=8, vision_dim=512)
        contexts = (128,)
    else:
        config = writer_config(
            hidden=2048, layers=8, intermediate=5504, heads=16, value_dim=1024, vision_dim=1024
        )
        contexts = (512,)
    model = random_model(config, setting.device, setting.dtype)
    for context in contexts:
        yield from token_cases(setting, model, context, images, is_compiled=setting.is_gpu)
        yield batch_case(setting, model, context, images[1])


@torch.inference_mode()
def token_cases(
    setting: Setting, model: Any, context: int, images: Sequence[int], *, is_compiled: bool = False
) -> Iterator[Case]:
    """All numbers of images in turns, so that their growth is measured at one time."""
    ours = {count: stepper(model, context, count) for count in images}
    for count in images:
        also: dict[str, Run] = {f"ours, {other} images": ours[other] for other in images if other != count}
        theirs = textbook_stepper(model, context, count) if count else ours[count]
        sides = {
            "textbook": theirs,
            "ours": ours[count],
            "static": stepper(model, context, count, room=context + 1),
        }
        if is_compiled:
            sides["compiled"] = stepper(
                model, context, count, room=context + 1, forward=compiled(setting, model)
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
            "ratios": {name: result.ratio(name, "ours") for name in sides},
            "tokens_a_second": 1 / min(result.median[name] for name in sides),
            "bytes": {"ours": read},
            "share_of_limit": read / bandwidth / min(result.median[name] for name in sides),
        }


@torch.inference_mode()
def batch_case(setting: Setting, model: Any, context: int, images: int) -> Case:
    """A word of each of several documents, all with pictures and of unequal length."""
    lengths = [context - SHORTER * row for row in range(ROWS)]
    caches = [filled_cache(model, length, images) for length in lengths]
    token_BTD = _normal(model, ROWS, 1, model.config.text_config.hidden_size)
    joined = side_by_side(caches, model.config.text_config, context + 1)
    length_B = torch.tensor(lengths, device=model.device)
    place_T = torch.arange(context + 1, device=model.device)
    mask_BT = (place_T >= context - length_B[:, None]).long()

    def one_by_one() -> Tensor:
        rows = [
            model(inputs_embeds=token_BTD[row : row + 1], past_key_values=cache).logits
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
            past_key_values=joined,
        ).logits
        joined.crop(-1)
        return logits

    result = compare(setting, {"one by one": one_by_one, "together": together})
    return {"images": images, "context": context, "documents": ROWS, **result.record("together")}


def compiled(setting: Setting, model: Any) -> Run:
    """A pass as transformers compiles it for a static cache: with CUDA graphs on a GPU."""
    return torch.compile(model.__call__, mode="reduce-overhead" if setting.is_gpu else None, fullgraph=True)


def stepper(
    model: Any, context: int, images: int, *, room: int | None = None, forward: Run | None = None
) -> Run:
    """One more token behind a cache; the cache is as before afterwards.

    Args:
        room: of a static cache.
        forward: the model's own where not given.
    """
    cache = filled_cache(model, context, images, room)
    token = _normal(model, 1, 1, model.config.text_config.hidden_size)
    forward = forward or model.__call__
    # What compiled code takes from the pass before it.
    model(inputs_embeds=token, past_key_values=cache, logits_to_keep=1)
    cache.crop(-1)
    if room is not None:
        cache.keep_addresses()

    def step() -> Tensor:
        logits = forward(inputs_embeds=token, past_key_values=cache, logits_to_keep=1).logits.clone()
        cache.crop(-1)
        return logits

    return step


def textbook_stepper(model: Any, context: int, images: int) -> Run:
    """The same, with layers that look into images as the textbook does."""
    with textbook_layers(model.language_model):
        step = stepper(model, context, images)

    def textbook_step() -> Tensor:
        with textbook_layers(model.language_model):
            return step()

    return textbook_step


def filled_cache(model: Any, context: int, images: int, room: int | None = None) -> PrefixCache:
    """Of random tokens, with images that began evenly among them; static with room for so many."""
    cache = PrefixCache(model.config.text_config, device=model.device, max_cache_len=room)
    if images:
        generator = torch.Generator().manual_seed(images)
        pixels = torch.rand(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        start = torch.arange(images, device=model.device)[None] * context // images
        features = model.encode_images(pixels.to(model.device, model.dtype))
        cache.append_images(start, model.values_by_row(features.pyramid, start))
    # Written in pieces: the textbook repeats every query for each image.
    for first in range(0, context, 64):
        piece = _normal(model, 1, min(64, context - first), model.config.text_config.hidden_size, seed=first)
        model(inputs_embeds=piece, past_key_values=cache, logits_to_keep=1)
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
