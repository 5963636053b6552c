"""Fields that requests share: how text is sampled, how images shall be; and settings made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.serving.errors import bad_request
from mm_interleaved.serving.request_body import Strict
from mm_interleaved.serving.settings import Limits

Nothing = Annotated[list[Any], Field(max_length=0)] | None
"""What OpenAI's clients may send as long as it asks for nothing."""
One = Annotated[int, Field(ge=1, le=1)] | None
Zero = Annotated[int, Field(ge=0, le=0)] | None
NoPenalty = Annotated[float, Field(ge=0, le=0)] | None
Text = Annotated[str, Field(max_length=1_000_000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)] | None
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")] | None
Pixels = Annotated[int, Field(ge=8, le=4096)] | None
Label = Annotated[str, Field(max_length=1000)] | None
AnswerFormat = Literal["images", "parts", "markdown"]
ImageKind = Literal["png", "jpeg", "webp"]


class ImageConfig(Strict):
    """OpenRouter's field for images."""

    aspect_ratio: Annotated[str, Field(pattern=r"^[0-9]{1,3}:[0-9]{1,3}$")] | None = None
    """Width to height, such as 16:9, at the number of pixels that the model was made for."""


class GenerationFields(Strict):
    """Generation settings by the names in use; at the top level, which is where `extra_body` puts them."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; above 0, tokens are sampled."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count = None
    do_sample: bool | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: Count = None
    num_beams: Annotated[int, Field(ge=1, le=64)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """The same request with the same seed has the same answer; by default each has a seed of its own."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    true_cfg_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Another name of `guidance_scale`."""
    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    size: Size = None
    """Width x height in pixels, or auto."""
    width: Pixels = None
    height: Pixels = None
    image_config: ImageConfig | None = None
    output_format: ImageKind | None = None
    scheduler: Annotated[str, Field(max_length=40)] | None = None
    step_cache: Count = None
    guidance_cache: Count = None
    num_candidates: Annotated[int, Field(ge=1, le=256)] | None = None
    context_images: Annotated[str, Field(max_length=200)] | list[int] | None = None
    context_strength: Annotated[float, Field(ge=0, le=1000)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    """Previews of each image on a stream."""


class DocumentFields(GenerationFields):
    """Fields of requests whose answer is a document, not one image."""

    layout: Annotated[str, Field(max_length=1000)] | None = None
    """Parts wanted in order, such as "T I T I"; auto lets the model decide."""
    max_images: Annotated[int, Field(ge=0)] | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    """text alone: no images. image alone: one image. Both: as the model likes."""
    as_document: bool | None = None
    """Read the messages as one running document, without roles; by default where one image is wanted."""
    preview_every: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Show an image on the stream after so many denoising steps each."""

    # What OpenAI's clients send and what changes nothing here.
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    """Nothing is stored, whatever is asked for."""
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Zero = None


_SAME = {
    "max_new_tokens": ("max_new_tokens", "max_completion_tokens", "max_tokens", "max_output_tokens"),
    "guidance_scale": ("guidance_scale", "true_cfg_scale"),
}
"""Settings that have several names in requests."""
_AS_THEY_ARE = (
    "top_k", "min_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "seed",
    "num_inference_steps", "negative_prompt", "scheduler", "step_cache", "guidance_cache", "num_candidates",
    "context_images", "context_strength", "layout", "max_images",
)  # fmt: skip


class Given:
    """The generation settings that a request gives, and under which names it gives them."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.params: dict[str, str] = {}

    def take(self, name: str, value: Any, param: str | None = None) -> None:
        """One setting."""
        self.settings[name] = value
        self.params[name] = param or name


def given_settings(request: GenerationFields, limits: Limits) -> Given:
    """The settings of a request, held against the server's limits. Raises ApiError."""
    given = Given()
    for name in _AS_THEY_ARE:
        if (value := getattr(request, name, None)) is not None:
            given.take(name, value)
    for name, spellings in _SAME.items():
        _take_one(given, request, name, spellings)
    _take_sampling(given, request)
    _take_size(given, request)
    _take_modalities(given, request)
    _check_limits(given, limits)
    return given


def _take_one(given: Given, request: GenerationFields, name: str, spellings: Sequence[str]) -> None:
    found = {each: value for each in spellings if (value := getattr(request, each, None)) is not None}
    if len(set(found.values())) > 1:
        *_, last = found
        raise bad_request(last, f"found {found[last]} beside other values ({', '.join(found)}), expected one")
    for spelling, value in found.items():
        given.take(name, value, spelling)


def _take_sampling(given: Given, request: GenerationFields) -> None:
    """OpenAI's clients ask for sampling by a temperature, not by a switch."""
    temperature, top_p = request.temperature, request.top_p
    if temperature:
        given.take("temperature", temperature)
    if top_p is not None:
        given.take("top_p", top_p)
    samples = request.do_sample
    if samples is None and (temperature is not None or top_p is not None or request.top_k is not None):
        samples = temperature != 0 and not (request.num_beams or 1) > 1
    if samples is not None:
        given.take("do_sample", samples)


def _take_size(given: Given, request: GenerationFields) -> None:
    named = [name for name in ("width", "height") if getattr(request, name) is not None]
    has_ratio = request.image_config is not None and request.image_config.aspect_ratio is not None
    has_size = request.size is not None and request.size != "auto"
    if bool(named) + has_ratio + has_size > 1:
        raise bad_request(
            named[0] if named else "size", "expected one of size, width and height, image_config.aspect_ratio"
        )
    for name in named:
        given.take(name, getattr(request, name))
    if has_size and request.size is not None:
        width, height = (int(side) for side in request.size.split("x"))
        if not (8 <= width <= 4096 and 8 <= height <= 4096):
            raise bad_request("size", f"found {request.size!r}, expected sides of 8 to 4096 pixels")
        given.take("width", width, "size")
        given.take("height", height, "size")


def _take_modalities(given: Given, request: GenerationFields) -> None:
    wanted = set(getattr(request, "modalities", None) or ())
    layout = given.settings.get("layout")
    if wanted == {"text"}:
        if layout is not None and "i" in layout.lower():
            raise bad_request("layout", "found images, expected none beside modalities of text alone")
        given.take("max_images", 0, "modalities")
    elif wanted == {"image"} and layout is None:
        given.take("layout", "I", "modalities")


def _check_limits(given: Given, limits: Limits) -> None:
    settings = given.settings
    most: Mapping[str, int] = {
        "max_new_tokens": limits.new_tokens,
        "max_images": limits.new_images,
        "num_inference_steps": limits.inference_steps,
        "num_beams": limits.beams,
        "num_candidates": limits.new_images,
    }
    for name, limit in most.items():
        if settings.get(name, 0) > limit:
            raise bad_request(
                given.params[name],
                f"found {settings[name]}, expected at most {limit} (a limit of this server)",
            )


def within_limits(
    settings: GenerationSettings, params: Mapping[str, str], limits: Limits, own_pixels: int
) -> GenerationSettings:
    """Complete settings, with what the model adds, held against limits of the work as a whole.

    Args:
        own_pixels: of an image as the model makes it by default; 0 where it makes none.

    Returns:
        The settings; where nobody said how many images there may be, as many as all candidates leave.

    Raises:
        ApiError: 400, with the field's place.
    """
    layout = settings.layout.split()
    is_auto = layout == ["auto"]
    if is_auto and "max_images" not in params:
        most_images = min(settings.max_images, limits.new_images // settings.num_candidates)
        settings = replace(settings, max_images=most_images)
    images = settings.max_images if is_auto else layout.count("I")
    if images * settings.num_candidates > limits.new_images:
        name = "max_images" if is_auto else "layout"
        raise bad_request(
            params.get(name, name),
            f"found {images} images of {settings.num_candidates} candidates each, expected at most "
            f"{limits.new_images} in all (a limit of this server)",
        )
    if not is_auto and len(layout) > limits.messages:
        raise bad_request("layout", f"found {len(layout)} parts, expected at most {limits.messages}")
    pixels = (settings.width or 1) * (settings.height or 1)
    most = min(limits.output_pixels, (limits.times_own_pixels * own_pixels) or limits.output_pixels)
    if pixels > most:
        raise bad_request(
            params.get("width", "size"),
            f"found {settings.width} x {settings.height} pixels, expected at most {most} in all, such as "
            f"{math.isqrt(most)}x{math.isqrt(most)} (a limit of this server)",
        )
    return settings


def preview_steps(request: GenerationFields, steps: int) -> int:
    """Denoising steps between two previews; 0 is none."""
    every = getattr(request, "preview_every", None)
    if every is not None:
        return every
    partial = request.partial_images or 0
    # There may be one more than asked for: whoever shows them counts.
    return max(1, steps // (partial + 1)) if partial else 0
