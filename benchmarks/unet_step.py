"""One denoising step with guidance: the synchronizers' share of it, without and with an earlier image.

Whole images of 30 and 250 steps are computed from the timed step, on a GPU denoised as well.
The share is that of the time between the middle and the upward path. On a CPU the sides run in a small size;
the published one is counted beside it, and its share is timed as well (not with --quick): of a step that
takes a quarter of a minute, both kinds of synchronizers, and the U-Net alone. After the steps come whole
images of the shipped model, see `denoising`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.cost import cached_cost, textbook_cost
from benchmarks.decode_token import COMPILING_SECONDS
from benchmarks.denoising import denoising_cases
from benchmarks.harness import Case, Run, Setting, compare, compiled, cpu_clock, wait
from benchmarks.models import random_image_decoder, synchronizer_sizes, unet_settings
from benchmarks.sizes import SynchronizerSize
from benchmarks.textbook import textbook_between
from mm_interleaved.generation.schedulers import build_scheduler
from mm_interleaved.models.operations import count_operations
from mm_interleaved.models.unet import Between, unet_forward

PUBLISHED = ((320, 640, 1280, 1280), 64, 1024)
"""Channels, cells along a side of the latents, width of values and conditioning."""
SMALL = ((64, 128, 256, 256), 16, 256)
"""The same for a CPU: both sides in turns within seconds."""
GUIDANCE = 7.5
GUIDED = 2
"""Images in a step: with the context and without."""
IMAGE_STEPS = (30, 250)
"""Of an image: as the released script samples, and as the paper was evaluated."""
COMPARED_STEPS = 3
"""Of an image whose outputs are compared; with random weights, rounding soon leads to another image."""


def run(setting: Setting) -> Iterator[Case]:
    if setting.is_gpu and not setting.quick:
        channels, sample_size, value_dim = PUBLISHED
    else:
        channels, sample_size, value_dim = SMALL
    decoder, sizes = random_image_decoder(channels, sample_size, value_dim, setting.device, setting.dtype)
    for images in (0, 1):
        case = step_case(setting, decoder, sizes, sample_size, images)
        yield {**case, "published": published_counts(images)}
    if setting.is_gpu:
        for steps in IMAGE_STEPS:
            if setting.has(0):
                step = prepare(setting, decoder, sizes, sample_size, images=1)
                yield image_case(setting, decoder, sample_size, step, steps)
    if not setting.is_gpu and not setting.quick:
        # 1.3 billion parameters; with the textbook's values of all layers that is most of 12 GB.
        del decoder
        decoder, sizes = random_image_decoder(*PUBLISHED, setting.device, setting.dtype)
        yield share_case(setting, decoder, sizes, PUBLISHED[1])
        del decoder
    yield from denoising_cases(setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A guided step of one image, and what is there before the first one."""

    latents: Tensor
    timestep: Tensor
    conditioning: Tensor
    guided: Any
    """Our values of the earlier image, for both halves."""
    textbook: Between
    """The textbook keeps the features alone, once for each half."""
    projecting_seconds: float


def prepare(
    setting: Setting, decoder: Any, sizes: Sequence[SynchronizerSize], sample_size: int, images: int
) -> Step:
    """One image, guided; it attends to one earlier image or none."""
    device, dtype = setting.device, setting.dtype
    generator = torch.Generator(device).manual_seed(images)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    levels, width = sizes[0].level_sizes, sizes[0].feature_dim
    pyramid = [normal(1, width, level, level) for level in levels]
    cells = torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid], dim=1)[:, None]
    visible = torch.full((1, 1), images > 0, device=device)
    begin = time.perf_counter()
    earlier = decoder.project_earlier_images(
        pyramid, torch.zeros(1, 1, dtype=torch.int64, device=device) - (1 - images)
    )
    wait(device)
    projecting = time.perf_counter() - begin
    return Step(
        latents=normal(GUIDED, 4, sample_size, sample_size),
        timestep=torch.tensor(501, device=device),
        conditioning=normal(GUIDED, 77, width),
        guided=earlier.repeat(GUIDED),
        textbook=textbook_between(
            decoder.synchronizers, cells.repeat(GUIDED, 1, 1, 1), visible.repeat(GUIDED, 1), levels
        ),
        projecting_seconds=projecting,
    )


@torch.inference_mode()
def step_case(
    setting: Setting, decoder: Any, sizes: Sequence[SynchronizerSize], sample_size: int, images: int
) -> Case:
    """A step, and what happens between the middle and the upward path alone."""
    step = prepare(setting, decoder, sizes, sample_size, images)
    inputs = (step.latents, step.timestep, step.conditioning)
    maps = _maps(decoder, inputs)
    ours_between = _between_of(decoder, step.guided)
    sides: dict[str, Run] = {
        "textbook": lambda: unet_forward(decoder.unet, *inputs, step.textbook),
        "ours": lambda: decoder.predict(*inputs, step.guided),
    }
    if setting.compiles and images and setting.has(2 * COMPILING_SECONDS):
        forward = compiled(unet_forward)
        sides["textbook, compiled"] = lambda: forward(decoder.unet, *inputs, step.textbook)
        sides["ours, compiled"] = lambda: forward(decoder.unet, *inputs, ours_between)
    result = compare(
        setting,
        sides,
        also={
            "without": lambda: unet_forward(decoder.unet, *inputs),
            "textbook synchronizers": lambda: step.textbook(*maps),
            "our synchronizers": lambda: ours_between(*maps),
        },
    )
    if not result.equal:
        return {"images": images, **result.record("ours")}
    return {
        "images": images,
        "channels": decoder.unet.config.block_out_channels[-1],
        "sample_size": sample_size,
        **result.record("ours"),
        "share": {
            "textbook": result.median["textbook synchronizers"] / result.median["textbook"],
            "ours": result.median["our synchronizers"] / result.median["ours"],
        },
        "ratios": {name: result.ratio(name) for name in sides},
        "projecting_once_seconds": step.projecting_seconds,
        "picture_seconds_computed": {
            side: computed_images(result.median[side], step.projecting_seconds if side == "ours" else 0.0)
            for side in ("textbook", "ours")
        },
        **_counted(decoder.unet, sizes, sample_size, images),
    }


def computed_images(step_seconds: float, once_seconds: float) -> dict[str, float]:
    """Of images of so many steps, without decoding them: what a timed step gives, times the steps."""
    return {f"{steps} steps": once_seconds + steps * step_seconds for steps in IMAGE_STEPS}


@torch.inference_mode()
def image_case(setting: Setting, decoder: Any, sample_size: int, step: Step, steps: int) -> Case:
    """All steps of one guided image, without decoding it; outputs are those of the first few steps."""
    scheduler_config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "clip_sample": False}

    def denoise_all(predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        scheduler: Any = build_scheduler("ddim", scheduler_config)
        scheduler.set_timesteps(steps, device=step.latents.device)
        latents, first = step.latents[:1], []
        for timestep in scheduler.timesteps:
            unguided, guided = predict(latents.expand(GUIDED, -1, -1, -1), timestep).chunk(GUIDED)
            noise = unguided + GUIDANCE * (guided - unguided)
            latents = scheduler.step(noise, timestep, latents).prev_sample
            if len(first) < COMPARED_STEPS:
                first.append(latents)
        return torch.stack(first)

    def textbook(latents: Tensor, timestep: Tensor) -> Tensor:
        return unet_forward(decoder.unet, latents, timestep, step.conditioning, step.textbook)

    def ours(latents: Tensor, timestep: Tensor) -> Tensor:
        return decoder.predict(latents, timestep, step.conditioning, step.guided)

    # An image takes seconds: the fewest turns must do.
    brief = replace(setting, least=1, seconds=0.0, patience=0.0)
    result = compare(brief, {"textbook": lambda: denoise_all(textbook), "ours": lambda: denoise_all(ours)})
    return {
        "kind": "image",
        "images": 1,
        "sample_size": sample_size,
        "steps": steps,
        **result.record("ours"),
    }


@torch.inference_mode()
def share_case(setting: Setting, decoder: Any, sizes: Sequence[SynchronizerSize], sample_size: int) -> Case:
    """The synchronizers' share of a step after one earlier image; steps are sums of parts that were timed."""
    step = prepare(setting, decoder, sizes, sample_size, images=1)
    inputs = (step.latents, step.timestep, step.conditioning)
    maps = _maps(decoder, inputs)
    ours_between = _between_of(decoder, step.guided)
    result = compare(setting, {"textbook": lambda: step.textbook(*maps), "ours": lambda: ours_between(*maps)})
    case = {"images": 1, "channels": decoder.unet.config.block_out_channels[-1], "sample_size": sample_size}
    if not result.equal:
        return {**case, **result.record("ours")}
    bare = min(cpu_clock(lambda: unet_forward(decoder.unet, *inputs), 1) for _ in range(2))
    record = result.record("ours")
    ratio = (bare + result.least["textbook"]) / (bare + result.least["ours"])
    return {
        **case,
        **record,
        # The textbook's step is not run at this size: a quarter of a minute each time.
        "ratio": ratio,
        "ratio_of_minima": ratio,
        "ratio_of_synchronizers": record["ratio"],
        "without_seconds": bare,
        "share": {side: least / (bare + least) for side, least in result.least.items()},
        "projecting_once_seconds": step.projecting_seconds,
        "picture_seconds_computed": {
            side: computed_images(bare + least, step.projecting_seconds if side == "ours" else 0.0)
            for side, least in result.least.items()
        },
        **_counted(decoder.unet, sizes, sample_size, 1),
    }


def _maps(decoder: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the synchronizers of a step are given: the middle and the skips."""
    kept: list[Any] = []

    def keep(middle: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept[:] = [middle, skips]
        return middle, skips

    unet_forward(decoder.unet, *inputs, keep)
    return kept[0], kept[1]


def _between_of(decoder: Any, earlier: Any) -> Between:
    """Our callback as `ImageDecoder.predict` makes it."""
    return decoder.synchronizers.callback(earlier.values, earlier.relative_index_IK, 1.0)


def published_counts(images: int) -> dict[str, Any]:
    """Operations of the published size."""
    channels, sample_size, value_dim = PUBLISHED
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_settings(channels, sample_size, value_dim))
    return _counted(unet, synchronizer_sizes(unet, sample_size, value_dim), sample_size, images)


def _counted(unet: Any, sizes: Sequence[SynchronizerSize], sample_size: int, images: int) -> dict[str, Any]:
    """Operations of a guided step, from shapes; the values of ours are there already."""
    bare = _unet_flops(unet, sample_size)
    theirs = mine = 0.0
    width, moved = next(unet.parameters()).element_size(), [0.0, 0.0]
    for size in sizes:
        # `base_size` is the side of the map itself.
        pixels = round(size.base_size) ** 2
        convolution = 2.0 * GUIDED * pixels * size.query_dim**2
        textbook = textbook_cost(size, pixels, 1, GUIDED, width)
        theirs += textbook.flops + convolution
        moved[0] += textbook.bytes + width * (size.query_dim**2 + 2 * GUIDED * pixels * size.query_dim)
        # The 1 x 1 convolution folds into the output projection; without an image all of it is a constant.
        if images:
            cached = cached_cost(size, pixels, pixels, GUIDED, width, images)
            mine, moved[1] = mine + cached.flops, moved[1] + cached.bytes
    return {
        "model_ratio": (bare + theirs) / (bare + mine),
        "flops": {"unet": bare, "textbook synchronizers": theirs, "our synchronizers": mine},
        "bytes": {"textbook synchronizers": moved[0], "our synchronizers": moved[1]},
        "share_of_flops": {"textbook": theirs / (bare + theirs), "ours": mine / (bare + mine)},
    }


def _unet_flops(unet: Any, sample_size: int) -> float:
    meta = unet
    if next(unet.parameters()).device.type != "meta":
        with torch.device("meta"):
            meta = UNet2DConditionModel.from_config(unet.config)
    width = meta.config.cross_attention_dim
    with torch.device("meta"):
        latents, conditioning = (
            torch.empty(GUIDED, 4, sample_size, sample_size),
            torch.empty(GUIDED, 77, width),
        )
        return count_operations(lambda: unet_forward(meta, latents, torch.tensor(1), conditioning)).products
