"""`gen_image.*`: every image of a batch of documents generated, or some of them, with several samplers.

Letters: B rows, T tokens, I images of all rows, K = 1 context images.
"""

from dataclasses import dataclass
from typing import Any

import torch
from golden import Golden, shared
from torch import Tensor

from mm_interleaved.generation.diffusion import denoise
from mm_interleaved.generation.schedulers import build_scheduler
from mm_interleaved.models.image_decoder import EarlierImages
from mm_interleaved.tokens.visibility import NO_IMAGE, context_images

from .contexts import gathered
from .recording import recorded

IMAGES_AT_ONCE = 8
"""The official pipeline generates so many images at once; its generator runs on from batch to batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image for each target, from one seed.

    `latents`: the last ones, scaled. `latents_in`, `predictions`: step by step, of the first batch.
    """

    latents: Tensor
    latents_in: Tensor
    predictions: Tensor


# ---- Steps ---------------------------------------------------------------------------------------


@shared
def prompt(golden: Golden) -> dict[str, Any]:
    """The documents as read: `hidden` states, `pyramid` of their images, `image_start`, `document_start`."""
    ids = golden.inputs["gen_image.text_ids"]
    pixels, image_start = golden.pixels(golden.inputs["gen_image.image_index"]), golden.image_start(ids)
    with recorded(vision=golden.model.vision) as record:
        output = golden.model(
            input_ids=ids,
            attention_mask=golden.inputs["gen_image.attention_mask"],
            pixel_values=pixels,
            image_start=image_start,
        )
    return {
        "hidden": output.hidden,
        "pyramid": record["vision"].pyramid,
        "image_start": image_start,
        # The official generation takes a row for one document.
        "document_start": torch.zeros_like(ids),
    }


@shared
def context(golden: Golden) -> tuple[Tensor, Tensor]:
    read = prompt(golden)
    return gathered(golden.model, read["hidden"], read["image_start"], read["document_start"])


@shared
def all_conditioning(golden: Golden) -> Tensor:
    """Conditioning of every image: (I, R, D)."""
    features, mask = context(golden)
    return golden.model.image_decoder.condition(features, mask.bool())


@shared
def earlier_images(golden: Golden) -> Tensor:
    """(I, K) numbers of the images that the U-Net looks at, -1 for none."""
    read = prompt(golden)
    limit = golden.model.max_context_images
    return context_images(read["document_start"], read["image_start"], "previous", limit)


@shared
def seen_by_all(golden: Golden) -> EarlierImages:
    """What the U-Net sees of them: every image projected once."""
    return golden.model.project_earlier_images(prompt(golden)["pyramid"], earlier_images(golden))


@shared
def samples(golden: Golden, case: str) -> list[Sample]:
    """The images of a case, as many times as it asks for."""
    first_seed = golden.config["model"]["image_decoder_config"]["sd_base_seed"]
    times = golden.arguments(f"gen_image.{case}").get("num_validation_images", 1)
    return [_sample(golden, case, first_seed + number) for number in range(times)]


def _sample(golden: Golden, case: str, seed: int) -> Sample:
    generator, batches = torch.Generator().manual_seed(seed), targets(golden, case).split(IMAGES_AT_ONCE)
    done = [_denoised(golden, case, batch, generator) for batch in batches]
    latents = torch.cat([trace[-1] for trace, _ in done])
    first_trace, predictions = done[0]
    return Sample(
        latents=latents, latents_in=torch.stack(first_trace[:-1]), predictions=torch.stack(predictions)
    )


def _denoised(
    golden: Golden, case: str, images: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents before each step and after the last, and what the U-Net predicted in each.

    Args:
        images: numbers of the images to be generated at once.
    """
    model, arguments = golden.model, golden.arguments(f"gen_image.{case}")
    unet = model.image_decoder.unet.config
    noise = torch.randn(
        len(images), unet.in_channels, unet.sample_size, unet.sample_size, generator=generator
    )
    steps = list(
        denoise(
            model.image_decoder,
            build_scheduler(arguments["scheduler"], model.config.scheduler_config),
            noise,
            all_conditioning(golden)[images],
            _seen_by(golden, images),
            num_inference_steps=arguments["num_inference_steps"],
            guidance_scale=arguments["guidance_scale"],
            generator=generator,
        )
    )
    return [noise, *(step.latents for step in steps)], [step.prediction for step in steps]


def _seen_by(golden: Golden, images: Tensor) -> EarlierImages:
    """What some images see."""
    seen = seen_by_all(golden)
    values = tuple(value._replace(image_BN=value.image_BN[images]) for value in seen.values)
    return EarlierImages(values, seen.relative_index_IK[images])


def targets(golden: Golden, case: str) -> Tensor:
    """Numbers, among all images of the documents, of those to be generated."""
    every_image = torch.arange(len(golden.inputs["gen_image.image_index"]))
    return golden.inputs.get(f"gen_image.{case}.target_image_idxs", every_image)


@shared
def decoded(golden: Golden, case: str) -> Tensor:
    """RGB in [0, 1]: all images of the first seed, then all of the next."""
    decoder = golden.model.image_decoder
    return torch.cat([decoder.decode(sample.latents) for sample in samples(golden, case)])


# ---- Outputs -------------------------------------------------------------------------------------


def context_features(golden: Golden) -> Tensor:
    return context(golden)[0]


def context_mask(golden: Golden) -> Tensor:
    return context(golden)[1]


def conditioning(golden: Golden, case: str) -> Tensor:
    return all_conditioning(golden)[targets(golden, case)]


def has_seen(golden: Golden, case: str) -> Tensor:
    """Both halves of guidance look at the same images."""
    seen = (earlier_images(golden)[targets(golden, case)] != NO_IMAGE).long()
    is_guided = golden.arguments(f"gen_image.{case}")["guidance_scale"] > 1
    return torch.cat([seen, seen]) if is_guided else seen


def final_latents(golden: Golden, case: str, number: str | None) -> Tensor:
    return samples(golden, case)[int(number or 0)].latents


def latents_in(golden: Golden, case: str) -> Tensor:
    return samples(golden, case)[0].latents_in


def predictions(golden: Golden, case: str) -> Tensor:
    return samples(golden, case)[0].predictions


def first_image(golden: Golden, case: str) -> Tensor:
    return decoded(golden, case)[:1]


def images(golden: Golden, case: str) -> Tensor:
    # The official rounding: x * 255 + 0.5, cut.
    return (decoded(golden, case) * 255 + 0.5).to(torch.uint8)


OUTPUTS = {
    r"gen_image\.context_features": context_features,
    r"gen_image\.context_attention_mask": context_mask,
    r"gen_image\.([^.]+)\.perceiver_out": conditioning,
    r"gen_image\.([^.]+)\.mmfs_mask_in_unet": has_seen,
    r"gen_image\.([^.]+)\.final_latents(?:\.val(\d+))?": final_latents,
    r"gen_image\.([^.]+)\.trace\.latents_in": latents_in,
    r"gen_image\.([^.]+)\.trace\.unet_out": predictions,
    r"gen_image\.([^.]+)\.image_first": first_image,
    r"gen_image\.([^.]+)\.image_u8": images,
}
