"""Images that documents ask for: several of them, of one document or of many, are denoised in one batch.

    ImageRequest (seeds, conditioning, earlier images, settings) -> denoise -> 8-bit images

Letters: I images denoised at once, R conditioning vectors, D their channels, K earlier images each attends
to.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.errors import NumericalError
from mm_interleaved.generation import diffusion, schedulers
from mm_interleaved.generation.events import ImagePreview
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.finite import check_finite
from mm_interleaved.models.image_decoder import EarlierImages, ImageDecoder

IMAGES_AT_ONCE = 8
"""Images in one batch of the U-Net, as many as the released code has."""
DENOISING_SETTINGS = (
    "scheduler", "num_inference_steps", "guidance_scale", "context_strength", "step_cache", "guidance_cache",
)  # fmt: skip
"""Settings that images of one batch have in common."""

GeneratedImages = list[PILImage.Image]


@dataclass(frozen=True, slots=True, eq=False)
class ImageRequest:
    """Images of one image part: one, or candidates to choose from."""

    decoder: ImageDecoder
    scheduler_config: Mapping[str, Any]
    settings: GenerationSettings
    seeds: Sequence[int]
    """Of the noise of each image."""
    size: tuple[int, int]
    """Height and width in pixels."""
    conditioning: Tensor
    """(1, R, D): what the images shall show."""
    negative_conditioning: Tensor | None
    """(1, R, D): what guidance pushes away from; None: the learned one."""
    earlier: EarlierImages | None
    """What the U-Net attends to."""
    is_published: bool = False
    """See `schedulers.scheduler_for`."""
    preview_every: int = 0
    """Steps between two previews; 0 is none."""

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What requests must have in common to share a batch."""
        settings = (getattr(self.settings, name) for name in DENOISING_SETTINGS)
        return id(self.decoder), self.size, self.is_published, self.preview_every, *settings


class _Noise(NamedTuple):
    """The noise of one image: the request that wants it, and its seed."""

    number: int
    seed: int


@torch.no_grad()
def denoise_batch(
    requests: Mapping[int, ImageRequest],
) -> Iterator[tuple[int, GeneratedImages | NumericalError | ImagePreview]]:
    """The images of each request, by its number; previews before, if they are wanted.

    Args:
        requests: of one `batch_key`. An image whose numbers are not finite is the error of its own request
            alone.
    """
    noises = [_Noise(number, seed) for number, request in requests.items() for seed in request.seeds]
    found: dict[int, GeneratedImages] = {number: [] for number in requests}
    failed: dict[int, NumericalError] = {}
    for start in range(0, len(noises), IMAGES_AT_ONCE):
        group = noises[start : start + IMAGES_AT_ONCE]
        latents = yield from _denoise([requests[noise.number] for noise in group], group)
        for noise, latents_1Xyx in zip(group, latents.split(1), strict=True):
            decoder = requests[noise.number].decoder
            try:
                check_finite(latents_1Xyx, "the latents of a generated image")
                found[noise.number] += diffusion.decode_images(decoder, latents_1Xyx)
            except NumericalError as error:
                failed.setdefault(noise.number, error)
    for number, images in found.items():
        yield number, failed.get(number, images)


def _denoise(
    requests: Sequence[ImageRequest], noises: Sequence[_Noise]
) -> Generator[tuple[int, ImagePreview], None, Tensor]:
    """Latents of one batch; `requests` has the request of each image."""
    first = requests[0]
    decoder, settings = first.decoder, first.settings
    generators = [torch.Generator().manual_seed(noise.seed) for noise in noises]
    latents = diffusion.initial_latents(decoder, *first.size, generators)
    steps = diffusion.denoise(
        decoder,
        schedulers.scheduler_for(
            settings.scheduler,
            first.scheduler_config,
            settings.num_inference_steps,
            is_published=first.is_published,
        ),
        latents,
        torch.cat([request.conditioning for request in requests]),
        join_earlier_images([request.earlier for request in requests]),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_conditioning=torch.cat([_negative(request) for request in requests]),
        context_strength=settings.context_strength,
        generator=generators,
        step_cache=settings.step_cache,
        guidance_cache=settings.guidance_cache,
    )
    for step in steps:
        latents = step.latents
        is_last = step.number == settings.num_inference_steps
        if first.preview_every and step.number % first.preview_every == 0 and not is_last:
            [image] = diffusion.decode_images(decoder, step.clean[:1])
            yield noises[0].number, ImagePreview(image, step.number)
    return latents


def _negative(request: ImageRequest) -> Tensor:
    if request.negative_conditioning is not None:
        return request.negative_conditioning
    return request.decoder.learned_negative(request.conditioning).expand_as(request.conditioning)


def join_earlier_images(earlier: Sequence[EarlierImages | None]) -> EarlierImages | None:
    """The earlier images of several images as one batch. What is shared is kept once."""
    given = [one for one in earlier if one is not None]
    if not given:
        return None
    parts = list({id(one): one for one in given}.values())
    places = {id(one): place for place, one in enumerate(parts)}
    if len(parts) == 1:
        return parts[0].repeat(len(given))
    # 1. The images of all, one after another; maps that share a tensor go on sharing it.
    joined: dict[tuple[int, ...], Tensor] = {}
    values = []
    for of_one_map in zip(*(one.values for one in parts), strict=True):
        key = tuple(id(value.value) for value in of_one_map)
        if key not in joined:
            joined[key] = torch.cat([value.value for value in of_one_map])
        # What was folded of the weights serves all images alike.
        values.append(of_one_map[0]._replace(value=joined[key]))
    # 2. Which image attends to which: rows are padded with hidden images.
    num_images = [len(one.values[0].value) for one in parts]
    first = [sum(num_images[:place]) for place in range(len(parts))]
    most = max(one.relative_index_IK.shape[1] for one in parts)
    image_IK = torch.cat([_padded(_images_of(one) + first[places[id(one)]], most) for one in given])
    relative_IK = torch.cat([_padded(one.relative_index_IK, most) for one in given])
    values = [value._replace(image_BN=image_IK) for value in values]
    return replace(parts[0], values=tuple(values), relative_index_IK=relative_IK)


def _images_of(one: EarlierImages) -> Tensor:
    image_IK = one.values[0].image_BN
    assert image_IK is not None, "`project_earlier_images` says which image stands where"
    return image_IK


def _padded(index_IK: Tensor, most: int) -> Tensor:
    return F.pad(index_IK, (0, most - index_IK.shape[1]))
