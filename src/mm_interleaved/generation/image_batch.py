"""Images that documents ask for: those of many documents are denoised side by side, a step at a time.

    ImageRequest (seeds, conditioning, earlier images, settings) -> ImageBatch -> 8-bit images

Each request has a loop of its own (`diffusion.denoising`), with its own sampler, number of steps and
guidance. What the loops ask the U-Net for is predicted in one pass, wherever each of them stands; so a
request may join at any step, and leave.
Letters: I images denoised at once, R conditioning vectors, D their channels, K earlier images each attends
to.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from mm_interleaved.models.unet import DeepFeatures

IMAGES_AT_ONCE = 8
"""Images that are denoised side by side, as many as the released code has in a batch."""
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


class ImageBatch:
    """Images that are being denoised: `step` does one step of some of them.

    Args:
        at_once: images denoised side by side at most; others wait.
    """

    def __init__(self, at_once: int = IMAGES_AT_ONCE):
        self.at_once = at_once
        self.sizes: Counter[int] = Counter()
        """How many passes of the U-Net had so many images."""
        self._requests: dict[int, ImageRequest] = {}
        # By the place of each loop's first image in its request.
        self._found: dict[int, dict[int, GeneratedImages]] = {}
        self._waiting: list[_Loop] = []
        self._running: list[_Loop] = []
        self._joined = _JoinedReading()

    def __len__(self) -> int:
        """Requests that wait for their images."""
        return len(self._requests)

    @property
    def is_running(self) -> bool:
        """Whether some image has been begun."""
        return bool(self._running)

    def add(self, number: int, request: ImageRequest) -> None:
        """Denoise the images of one more request, from the next step on."""
        self._requests[number], self._found[number] = request, {}
        self._waiting += [
            _Loop(number, request, range(first, min(first + self.at_once, len(request.seeds))))
            for first in range(0, len(request.seeds), self.at_once)
        ]

    def drop(self, number: int) -> None:
        """Forget a request, if it is there; nothing more is computed for it."""
        if self._requests.pop(number, None) is None:
            return
        del self._found[number]
        self._waiting = [loop for loop in self._waiting if loop.number != number]
        self._running = [loop for loop in self._running if loop.number != number]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, GeneratedImages | NumericalError | ImagePreview]]:
        """One pass of the U-Net; previews that are due, and the images of requests that are done, each by the
        number of its request. An image whose numbers are not finite is the error of its own request alone.
        """
        self._admit()
        loops = self._of_one_pass()
        self.sizes[sum(len(loop.places) for loop in loops)] += 1
        predictions = self._predict(loops)
        # Whoever was served goes to the end, so that passes of different kinds take turns.
        self._running = [loop for loop in self._running if loop not in loops] + loops
        answers: list[tuple[int, GeneratedImages | NumericalError | ImagePreview]] = []
        for loop, prediction in zip(loops, predictions, strict=True):
            # Another loop of its request may have failed.
            if loop.number in self._requests:
                answers += self._go_on(loop, prediction)
        return answers

    def _admit(self) -> None:
        """Loops begin in the order in which they came, while there is room."""
        room = self.at_once - sum(len(loop.places) for loop in self._running)
        while self._waiting and len(self._waiting[0].places) <= room:
            loop = self._waiting.pop(0)
            loop.begin()
            room -= len(loop.places)
            self._running.append(loop)

    def _of_one_pass(self) -> list["_Loop"]:
        """The loop that was served longest ago, and all whose predictions can be computed with its own."""
        wanted = self._running[0].pass_key
        return [loop for loop in self._running if loop.pass_key == wanted]

    def _predict(self, loops: Sequence["_Loop"]) -> Sequence[Tensor]:
        decoder, asked = loops[0].request.decoder, [loop.asked for loop in loops]
        if len(asked) == 1:
            return [diffusion.predict(decoder, asked[0])]
        rows = [len(each.latents) for each in asked]
        deep = join_deep_features([each.deep for each in asked])
        prediction = diffusion.predict(
            decoder,
            diffusion.UNetInput(
                torch.cat([each.latents for each in asked]),
                torch.cat([each.timestep.expand(count) for each, count in zip(asked, rows, strict=True)]),
                self._joined.of([each.reading for each in asked]),
                asked[0].context_strength,
                deep,
            ),
        )
        if deep is not None:
            assert deep.hidden is not None
            for each, hidden in zip(asked, deep.hidden.split(rows), strict=True):
                assert each.deep is not None
                each.deep.hidden = hidden
        return prediction.split(rows)

    def _go_on(
        self, loop: "_Loop", prediction: Tensor
    ) -> list[tuple[int, GeneratedImages | NumericalError | ImagePreview]]:
        """What comes of one loop's step."""
        number, request = loop.number, loop.request
        step = loop.go_on(prediction)
        try:
            if not loop.is_done:
                if request.preview_every and step.number % request.preview_every == 0:
                    [image] = diffusion.decode_images(request.decoder, step.clean[:1])
                    return [(number, ImagePreview(image, step.number))]
                return []
            images: GeneratedImages = []
            for latents_1Xyx in step.latents.split(1):
                check_finite(latents_1Xyx, "the latents of a generated image")
                images += diffusion.decode_images(request.decoder, latents_1Xyx)
        except NumericalError as error:
            self.drop(number)
            return [(number, error)]
        self._running.remove(loop)
        found = self._found[number]
        found[loop.places.start] = images
        if sum(map(len, found.values())) < len(request.seeds):
            return []
        self.drop(number)
        return [(number, [image for first in sorted(found) for image in found[first]])]


class _Loop:
    """The loop of one request's images, or of some of them.

    Args:
        places: of its images among those of the request.
    """

    asked: diffusion.UNetInput
    """What it wants predicted."""

    def __init__(self, number: int, request: ImageRequest, places: range):
        self.number, self.request, self.places = number, request, places
        self.is_done = False

    def begin(self) -> None:
        """From here on it takes memory."""
        request, count, settings = self.request, len(self.places), self.request.settings
        generators = [torch.Generator().manual_seed(request.seeds[place]) for place in self.places]
        self._steps = diffusion.denoising(
            schedulers.scheduler_for(
                settings.scheduler,
                request.scheduler_config,
                settings.num_inference_steps,
                is_published=request.is_published,
            ),
            diffusion.initial_latents(request.decoder, *request.size, generators),
            diffusion.Reading(
                request.conditioning.expand(count, -1, -1),
                None if request.earlier is None else request.earlier.repeat(count),
            ),
            _negative(request),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            context_strength=settings.context_strength,
            generator=generators,
            step_cache=settings.step_cache,
            guidance_cache=settings.guidance_cache,
        )
        self._ask()

    def go_on(self, prediction: Tensor) -> diffusion.DenoisingStep:
        """The step that this prediction makes; afterwards it asks for the next one, or is done."""
        step = self._steps.send(prediction)
        assert isinstance(step, diffusion.DenoisingStep)
        self.is_done = step.number == self.request.settings.num_inference_steps
        if not self.is_done:
            self._ask()
        return step

    def _ask(self) -> None:
        asked = next(self._steps)
        assert isinstance(asked, diffusion.UNetInput)
        self.asked = asked

    @property
    def pass_key(self) -> tuple[Any, ...]:
        """What loops must have in common to share a pass of the U-Net."""
        asked = self.asked
        deep = None if asked.deep is None else asked.deep.hidden is None
        return id(self.request.decoder), asked.latents.shape[1:], asked.context_strength, deep


class _JoinedReading:
    """What several loops read, as one batch; joined anew only when other loops share the pass."""

    def __init__(self) -> None:
        self._parts: list[diffusion.Reading] = []

    def of(self, parts: list[diffusion.Reading]) -> diffusion.Reading:
        if [id(part) for part in parts] != [id(part) for part in self._parts]:
            self._parts = parts
            self._joined = diffusion.Reading(
                torch.cat([part.conditioning for part in parts]),
                join_earlier_images([part.earlier for part in parts]),
            )
        return self._joined


def join_deep_features(parts: Sequence[DeepFeatures | None]) -> DeepFeatures | None:
    """Deep features of several loops as those of one batch: all have some, or none has."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    hidden = [part.hidden for part in given if part.hidden is not None]
    return DeepFeatures(torch.cat(hidden) if hidden else None)


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
