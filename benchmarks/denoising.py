"""Whole images of the shipped model: what each faster way of denoising saves, and what it costs.

Part of `unet_step`. Exact ways are compared by their latents; the others approximate, and the case reports
how far their images are from the exact ones of the same noise, in levels of 0 to 255.
"""

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from benchmarks.harness import HALF, Case, Setting, compare
from mm_interleaved.generation import diffusion, schedulers
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.acceleration import compile_image_decoder, use_channels_last
from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder

TEXT = "Here is Lulu, a green duck with a white crown. It is a cloudy day in the town. Lulu sits on the left."
LOSSY: dict[str, dict[str, Any]] = {
    "step_cache=2": {"step_cache": 2},
    "step_cache=3": {"step_cache": 3},
    "guidance_cache=2": {"guidance_cache": 2},
    "step_cache=2, guidance_cache=2": {"step_cache": 2, "guidance_cache": 2},
    "dpm-solver++, 10 steps": {"scheduler": "dpm-solver++", "num_inference_steps": 10},
    "unipc, 8 steps": {"scheduler": "unipc", "num_inference_steps": 8},
    "euler, 15 steps": {"scheduler": "euler", "num_inference_steps": 15},
}
QUICK = ("step_cache=2", "guidance_cache=2", "unipc, 8 steps")
KIND = "painting"
"""In result files, whose names stay those of the first release."""
COMPARED_WITH = {"scheduler": "ddim", "num_inference_steps": 25}
"""The sampler whose images the others are compared with, whatever the model's own is."""


@dataclass(frozen=True, slots=True)
class DenoisingInputs:
    """What images are denoised from."""

    decoder: ImageDecoder
    scheduler_config: Mapping[str, Any]
    settings: GenerationSettings
    """The model's own, with the sampler that all are compared with."""
    conditioning: Tensor
    earlier: EarlierImages | None

    def steps(self, seed: int, decoder: ImageDecoder | None = None, **switches: Any) -> list[Tensor]:
        """The latents after each step."""
        chosen = GenerationSettings.combine(self.settings.to_dict(), switches)
        decoder = decoder or self.decoder
        generator = torch.Generator().manual_seed(seed)
        height, width = diffusion.default_size(decoder)
        steps = diffusion.denoise(
            decoder,
            schedulers.build_scheduler(chosen.scheduler, self.scheduler_config),
            diffusion.initial_latents(decoder, height, width, [generator]),
            self.conditioning,
            self.earlier,
            num_inference_steps=chosen.num_inference_steps,
            guidance_scale=chosen.guidance_scale,
            generator=generator,
            step_cache=chosen.step_cache,
            guidance_cache=chosen.guidance_cache,
        )
        return [step.latents for step in steps]


def denoising_cases(setting: Setting) -> Iterator[Case]:
    # An image takes a second: a few turns must do.
    setting = replace(setting, least=3, seconds=0.0, patience=0.0)
    inputs = prepare_inputs(setting)
    yield from exact_cases(setting, inputs)
    exact = [inputs.steps(seed) for seed in range(2 if setting.quick else 4)]
    for name in QUICK if setting.quick else LOSSY:
        yield lossy_case(setting, inputs, exact, name, LOSSY[name])


@torch.no_grad()
def prepare_inputs(setting: Setting, model_name: str = "storyworld") -> DenoisingInputs:
    """The shipped model after a sentence and an image of noise, which the U-Net attends to."""
    dtype = str(setting.dtype).removeprefix("torch.")
    generator = load_generator(find_model(model_name), device=str(setting.device), dtype=dtype)
    model, processor = generator.model, generator.processor
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    session = InterleavedSession(model)
    session.append_text([processor.vocabulary.bos, *processor.vocabulary.encode_text(TEXT)])
    session.append_image(torch.from_numpy(processor.encoder_pixels(PILImage.fromarray(noise)))[None])
    session.start_image()
    return DenoisingInputs(
        model.image_decoder,
        model.config.scheduler_config,
        GenerationSettings.combine(model.config.generation_settings or {}, COMPARED_WITH),
        session.conditioning(),
        session.earlier_images("all"),
    )


def exact_cases(setting: Setting, inputs: DenoisingInputs) -> Iterator[Case]:
    """Another memory layout; on a GPU, compiled blocks too (on a CPU compiling takes longer than that)."""
    last = copy.deepcopy(inputs.decoder)
    use_channels_last(last)
    sides = {"as it is": inputs.steps, "channels_last": partial(inputs.steps, decoder=last)}
    if setting.is_gpu:
        compiled = copy.deepcopy(last)
        compile_image_decoder(compiled)
        sides["channels_last, compiled"] = partial(inputs.steps, decoder=compiled)
    result = compare(
        setting,
        {name: lambda f=f: f(0)[-1] for name, f in sides.items()},
        # Twenty-five steps add up what each rounds off.
        tolerance=None if setting.dtype in HALF else 1e-3,
    )
    steps = inputs.settings.num_inference_steps
    for name in list(sides)[1:]:
        yield {"kind": KIND, "switch": name, "exact": True, "steps": steps, **result.record(name)}


def lossy_case(
    setting: Setting,
    inputs: DenoisingInputs,
    exact: Sequence[list[Tensor]],
    name: str,
    switches: Mapping[str, Any],
) -> Case:
    """`equal`: the first step, in which no cache leaves anything out, is the same as in the exact image."""
    lossy = [inputs.steps(seed, **switches) for seed in range(len(exact))]
    is_same = "scheduler" in switches or all(
        torch.equal(a[0], b[0]) for a, b in zip(exact, lossy, strict=True)
    )
    errors = [
        diffusion.pixel_error(*(diffusion.decode_images(inputs.decoder, each[-1])[0] for each in pair))
        for pair in zip(lossy, exact, strict=True)
    ]
    result = compare(
        setting,
        {"exact": lambda: inputs.steps(0)[-1]},
        also={"switch": lambda: inputs.steps(0, **switches)[-1]},
    )
    record = result.record("switch")
    return {
        "kind": KIND,
        "switch": name,
        "exact": False,
        "steps": switches.get("num_inference_steps", inputs.settings.num_inference_steps),
        **record,
        "equal": record["equal"] and is_same,
        "pixel_error": statistics.fmean(errors),
        "pixel_error_most": max(errors),
    }
