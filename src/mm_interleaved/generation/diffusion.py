"""Pictures: from noise to latents under the document's conditioning, and from latents to pixels.

Network (`ImageDecoder`), sampler (a scheduler of diffusers) and loop (`denoise`) are three things; the
scheduler owns all mathematics of time.
Letters: I images painted at once, X latent channels, y and x rows and columns of the latents, R conditioning
vectors, D their channels.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image as PILImage
from torch import Tensor

from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder

SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


class DenoisingStep(NamedTuple):
    """Where the loop stands after a step.

    `number`: steps done, from 1. `latents`: (I, X, y, x), less noisy than before. `clean`: the scheduler's
    guess at the clean latents, for previews; DPM-Solver++ and UniPC tell none: there it is the noisy ones.
    `prediction`: the U-Net's own words, unguided half first if there is guidance.
    """

    number: int
    latents: Tensor
    clean: Tensor
    prediction: Tensor


@torch.no_grad()
def denoise(
    decoder: ImageDecoder,
    scheduler: SchedulerMixin,
    latents: Tensor,
    conditioning: Tensor,
    earlier: EarlierImages | None,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    negative_conditioning: Tensor | None = None,
    context_strength: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[DenoisingStep]:
    """Turn noise into the latents of images, step by step; the last step's latents are the result.

    Guidance acts on the conditioning alone: both halves look at the same earlier images, as in training.

    Args:
        latents: standard normal noise, (I, X, y, x).
        conditioning: what the images shall show, (I, R, D).
        earlier: what they look at.
        guidance_scale: 1 or less is no guidance.
        negative_conditioning: what guidance pushes away from, (1 or I, R, D); default: the learned one.
        context_strength: 1 looks at earlier images as in training, 0 not at all.
        generator: where the noise of the steps comes from; one an image, or one for all.
    """
    is_guided = guidance_scale > 1
    if negative_conditioning is None:
        negative_conditioning = decoder.negative_conditioning
    if is_guided:
        conditioning = torch.cat([negative_conditioning.expand_as(conditioning), conditioning])
        earlier = None if earlier is None else earlier.repeat(2)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if "generator" in accepted else {}
    # The loop adds small differences up: single precision or better, whatever the network computes in.
    latents = latents.to(torch.promote_types(conditioning.dtype, torch.float32)) * scheduler.init_noise_sigma

    for number, timestep in enumerate(scheduler.timesteps, start=1):
        # 1. Expand.
        model_input = scheduler.scale_model_input(
            torch.cat([latents, latents]) if is_guided else latents, timestep
        )
        # 2. Predict.
        prediction = decoder.predict(
            model_input.to(conditioning.dtype),
            timestep,
            conditioning,
            earlier,
            context_strength=context_strength,
        )
        # 3. Guide.
        guided = prediction.to(latents.dtype)
        if is_guided:
            without, with_conditioning = guided.chunk(2)
            guided = without + guidance_scale * (with_conditioning - without)
        # 4. Step.
        result = scheduler.step(guided, timestep, latents, **noise)
        latents = result.prev_sample
        yield DenoisingStep(number, latents, getattr(result, "pred_original_sample", latents), prediction)


def build_scheduler(name: str, scheduler_config: Mapping[str, Any]) -> SchedulerMixin:
    """A sampler by name, for the noise schedule that the model was trained with."""
    kind = SCHEDULERS[name]
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in scheduler_config.items() if key in known})


def latent_shape(decoder: ImageDecoder, height: int, width: int) -> tuple[int, int, int]:
    """(X, y, x) of the latents of one picture. Any size that the autoencoder can make will do.

    Raises:
        ValueError: a side is no multiple of the autoencoder's factor.
    """
    factor = decoder.latent_factor
    if height % factor or width % factor:
        raise ValueError(
            f"height and width: found {height} and {width} pixels, expected multiples of {factor}"
        )
    return decoder.unet.config.in_channels, height // factor, width // factor


def initial_latents(
    decoder: ImageDecoder, height: int, width: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """Standard normal noise, one image a generator, on the decoder's device: (I, X, y, x).

    Raises:
        ValueError: the size does not fit the autoencoder.
    """
    shape = (len(generators), *latent_shape(decoder, height, width))
    return randn_tensor(shape, generator=list(generators), device=decoder.negative_conditioning.device)


def default_size(decoder: ImageDecoder) -> tuple[int, int]:
    """Height and width in pixels that the U-Net was made for."""
    size = decoder.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * decoder.latent_factor, columns * decoder.latent_factor


@torch.no_grad()
def decode_pictures(decoder: ImageDecoder, latents: Tensor) -> list[PILImage.Image]:
    """8-bit pictures of scaled latents; rounded as the released code does."""
    pixels = decoder.decode(latents).float().cpu().permute(0, 2, 3, 1).numpy()
    return [PILImage.fromarray((picture * 255 + 0.5).astype(np.uint8)) for picture in pixels]
