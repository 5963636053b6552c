"""Image generation: from noise to latents under the document's conditioning, from latents to pixels.

Network (`ImageDecoder`), sampler (a scheduler of diffusers) and loop (`denoising`) are three things; the
scheduler owns all mathematics of time. The loop asks for each prediction, so that whoever answers may compute
those of several loops in one pass of the U-Net.
Letters: I images denoised at once, X latent channels, y and x rows and columns of the latents, R conditioning
vectors, D their channels.
"""

import inspect
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image as PILImage
from torch import Tensor

from mm_interleaved.generation.default_dtype import single_precision
from mm_interleaved.generation.schedulers import set_time_steps
from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder
from mm_interleaved.models.unet import DeepFeatures


class DenoisingStep(NamedTuple):
    """Where the loop stands after a step.

    `number`: steps done, from 1. `latents`: (I, X, y, x), less noisy than before. `clean`: the scheduler's
    guess at the clean latents, for previews; where it has none (DPM-Solver++, UniPC, TCD), the noisy ones.
    `prediction`: the U-Net's output, unguided half first if this step computed one.
    """

    number: int
    latents: Tensor
    clean: Tensor
    prediction: Tensor


class Reading(NamedTuple):
    """What the U-Net is given of each row beside its latents: its conditioning, and the earlier images that
    it attends to.
    """

    conditioning: Tensor
    earlier: EarlierImages | None

    def with_unguided(self, negative_conditioning: Tensor) -> "Reading":
        """The same, the unguided half before it."""
        negative = negative_conditioning.expand_as(self.conditioning)
        earlier = None if self.earlier is None else self.earlier.repeat(2)
        return Reading(torch.cat([negative, self.conditioning]), earlier)


@dataclass(frozen=True, slots=True, eq=False)
class UNetInput:
    """A prediction that a loop asks for: one pass of the U-Net."""

    latents: Tensor
    """(rows, X, y, x), in the number format of the conditioning."""
    timestep: Tensor
    """A scalar."""
    reading: Reading
    """The same object in all steps that read the same."""
    context_strength: float = 1.0
    deep: DeepFeatures | None = None
    """See `unet_forward`."""


def predict(decoder: ImageDecoder, asked: UNetInput) -> Tensor:
    """The U-Net's prediction: (rows, X, y, x)."""
    return decoder.predict(
        asked.latents,
        asked.timestep,
        asked.reading.conditioning,
        asked.reading.earlier,
        context_strength=asked.context_strength,
        deep=asked.deep,
    )


@torch.inference_mode()
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
    step_cache: int = 1,
    guidance_cache: int = 1,
) -> Iterator[DenoisingStep]:
    """Turn noise into the latents of images, step by step; the last step's latents are the result.

    Computes in PyTorch's inference mode, as its results then are: nothing can be derived from them.
    Arguments and errors as `denoising`, but for:

    Args:
        negative_conditioning: what guidance pushes away from, (1 or I, R, D); default: the learned one.
    """
    if negative_conditioning is None:
        negative_conditioning = decoder.learned_negative(conditioning)
    loop = denoising(
        scheduler,
        latents,
        Reading(conditioning, earlier),
        negative_conditioning,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        context_strength=context_strength,
        generator=generator,
        step_cache=step_cache,
        guidance_cache=guidance_cache,
    )
    answer = None
    while True:
        try:
            item = loop.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(item, UNetInput):
            answer = predict(decoder, item)
        else:
            yield item


def denoising(
    scheduler: SchedulerMixin,
    latents: Tensor,
    reading: Reading,
    negative_conditioning: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    context_strength: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    step_cache: int = 1,
    guidance_cache: int = 1,
) -> Generator[UNetInput | DenoisingStep, Any, None]:
    """The loop: it yields what the U-Net shall predict, is sent the prediction, and yields the step.

    Guidance acts on the conditioning alone: both halves attend to the same earlier images, as in training.

    Args:
        latents: standard normal noise, (I, X, y, x).
        reading: what the images shall show, (I, R, D), and the images whose pyramids the U-Net attends to.
        negative_conditioning: what guidance pushes away from, (1 or I, R, D).
        guidance_scale: 1 or less is no guidance.
        context_strength: scale of what earlier images add; 1 is as in training, 0 ignores them.
        generator: where the noise of the steps comes from; one an image, or one for all.
        step_cache: compute the U-Net's deep blocks in every so manyth step, and use them again in between
            (see `DeepFeatures`); 1 is exact.
        guidance_cache: compute what guidance adds in every so manyth step, and use it again in between, where
            the unguided half is left out; 1 is exact.

    Raises:
        ValueError: the scheduler cannot do that many steps, see `schedulers.scheduler_for`.
    """
    is_guided = guidance_scale > 1
    both = reading.with_unguided(negative_conditioning) if is_guided else reading
    set_time_steps(scheduler, num_inference_steps, latents.device)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if "generator" in accepted else {}
    dtype = reading.conditioning.dtype
    # The loop adds small differences up: single precision or better, whatever the network computes in.
    latents = latents.to(torch.promote_types(dtype, torch.float32)) * scheduler.init_noise_sigma
    deep = DeepFeatures() if step_cache > 1 else None
    guidance = latents.new_zeros(())

    for index, timestep in enumerate(scheduler.timesteps):
        # 1. Expand.
        has_unguided = is_guided and index % guidance_cache == 0
        with single_precision():
            model_input = scheduler.scale_model_input(
                torch.cat([latents, latents]) if has_unguided else latents, timestep
            )
        if deep is not None:
            deep.keep_for(len(model_input), is_fresh=index % step_cache != 0)
        # 2. Predict.
        read = both if has_unguided else reading
        prediction = yield UNetInput(model_input.to(dtype), timestep, read, context_strength, deep)
        # 3. Guide.
        guided = prediction.to(latents.dtype)
        if has_unguided:
            without, with_conditioning = guided.chunk(2)
            guidance = with_conditioning - without
            guided = without + guidance_scale * guidance
        elif is_guided:
            guided = guided + (guidance_scale - 1) * guidance
        # 4. Step.
        with single_precision():
            result = scheduler.step(guided, timestep, latents, **noise)
        latents = result.prev_sample
        yield DenoisingStep(index + 1, latents, _clean_latents(result), prediction)


def _clean_latents(result: Any) -> Tensor:
    # Each kind of scheduler has its own name for it; those of several orders have none.
    for name in ("pred_original_sample", "denoised"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result.prev_sample


def latent_shape(decoder: ImageDecoder, height: int, width: int) -> tuple[int, int, int]:
    """(X, y, x) of the latents of one image. Any size that the autoencoder can make will do.

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
    # Single precision, whatever torch's default is, so that the numbers are the same.
    return randn_tensor(shape, generator=list(generators), device=decoder.device, dtype=torch.float32)


def default_size(decoder: ImageDecoder) -> tuple[int, int]:
    """Height and width in pixels that the U-Net was made for."""
    size = decoder.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * decoder.latent_factor, columns * decoder.latent_factor


@torch.no_grad()
def decode_images(decoder: ImageDecoder, latents: Tensor) -> list[PILImage.Image]:
    """8-bit images of scaled latents, (I, X, y, x); rounded as the released code does."""
    pixels = decoder.decode(latents).float().cpu().permute(0, 2, 3, 1).numpy()
    return [PILImage.fromarray((image * 255 + 0.5).astype(np.uint8)) for image in pixels]


def pixel_error(found: PILImage.Image, expected: PILImage.Image) -> float:
    """Mean absolute difference of two images of one size, in levels of 0 to 255."""
    return float(np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).mean())
