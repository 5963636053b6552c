"""What generated images shall be like, held against what a model can do, before anything is computed."""

from collections.abc import Sequence
from dataclasses import replace

from mm_interleaved.documents.layout import IMAGE
from mm_interleaved.errors import UsageError
from mm_interleaved.generation import diffusion
from mm_interleaved.generation.defaults import defaults_of
from mm_interleaved.generation.logits import is_released
from mm_interleaved.generation.schedulers import scheduler_for
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.acceleration import Adapter
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration


def image_size(
    model: MMInterleavedForConditionalGeneration,
    settings: GenerationSettings,
    layout: Sequence[str] | None,
) -> tuple[int, int]:
    """Height and width of generated images in pixels; 0 and 0 for a model that generates none.

    Raises:
        UsageError: the layout has images, but the model has no image decoder; or a side is no multiple of the
            autoencoder's factor.
    """
    decoder = model.image_decoder
    if decoder is None:
        if layout is not None and IMAGE in layout:
            raise UsageError(
                f"layout: found {settings.layout!r}, but this model generates no images", field="layout"
            )
        return 0, 0
    trained = diffusion.default_size(decoder)
    height, width = settings.height or trained[0], settings.width or trained[1]
    try:
        diffusion.latent_shape(decoder, height, width)
    except ValueError as error:
        raise UsageError(str(error), field="height" if settings.height else "width") from error
    return height, width


def check_sampler(
    model: MMInterleavedForConditionalGeneration,
    settings: GenerationSettings,
    layout: Sequence[str] | None,
    adapter: Adapter | None,
) -> None:
    """Refuses a number of denoising steps before the first of them, that of the exact image too.

    Raises:
        UsageError: the sampler cannot do so many steps.
    """
    wants_none = settings.max_images == 0 if layout is None else IMAGE not in layout
    if model.image_decoder is None or wants_none:
        return
    asked = {"num_inference_steps": settings}
    if settings.report_error:
        asked["report_error"] = exact_settings(model, settings, adapter)
    for field, chosen in asked.items():
        try:
            scheduler_for(
                chosen.scheduler,
                model.config.scheduler_config,
                chosen.num_inference_steps,
                is_published=is_released(model, settings),
            )
        except ValueError as error:
            raise UsageError(f"{field}: {error}", field=field) from error


def exact_settings(
    model: MMInterleavedForConditionalGeneration, settings: GenerationSettings, adapter: Adapter | None
) -> GenerationSettings:
    """Settings of the image that errors are measured against: no step and no guidance is left out.

    Where the weights differ (an adapter), or nothing but the sampler is a shorter way, the exact image is
    that of the model's own sampler in its own number of steps.
    """
    exact = replace(settings, step_cache=1, guidance_cache=1)
    own = GenerationSettings.combine(defaults_of(model))
    if adapter is not None or not settings.is_lossy:
        exact = replace(exact, scheduler=own.scheduler, num_inference_steps=own.num_inference_steps)
    return exact if adapter is None else replace(exact, guidance_scale=own.guidance_scale)
