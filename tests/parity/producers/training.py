"""`forward.*`: one training pass over packed rows, read by the language model, then painted; its variants.

A variant differs from the main pass in its arguments (config.json, `meta.forward.variant_arguments`), in
masks among the inputs, or, under the name `ignore_noimage`, in coming from a dataset of the ignore list. It
reads and paints again only where that differs.
Letters: B rows, T tokens, I images of all rows, K = 1 context images.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from golden import Golden, shared
from torch import Tensor

from by_ids import document_starts, targets_after_an_image, text_targets
from mm_interleaved.models.denoising import DiffusionNoise
from mm_interleaved.models.image_values import flatten_pyramid
from mm_interleaved.models.losses import squared_errors, text_loss
from mm_interleaved.models.targets import TrainingTargets
from mm_interleaved.tokens.visibility import NO_IMAGE, context_images, next_token_labels, visible_images

from .contexts import gathered
from .recording import recorded

PROMPT_OFFSET = "ignore_prompt_token_offset"
LOSS_WEIGHTS = {"loss_txt_weight": 1.0, "loss_img_weight": 10.0}
"""Official names and defaults."""


# ---- Inputs --------------------------------------------------------------------------------------


@shared
def batch(golden: Golden) -> dict[str, Tensor]:
    """The rows as our model takes them."""
    ids = golden.inputs["forward.text_ids"]
    return {
        "input_ids": ids,
        "attention_mask": golden.inputs["forward.attention_mask"],
        "image_start": golden.image_start(ids),
        "document_start": document_starts(ids, golden.tokens["bos_token_id"]),
        "pixel_values": golden.inputs["forward.image_tensors_u8"].float() / 255,
    }


def noise(golden: Golden, drop: Tensor | None = None) -> DiffusionNoise:
    """The random numbers of the image loss; `drop` (I,) bool: whose conditioning is dropped, default none."""
    timestep = golden.inputs["forward.timesteps"]
    return DiffusionNoise(
        timestep=timestep,
        noise=golden.inputs["forward.diffusion_noise"],
        latent_noise=golden.inputs["forward.vae_sample_noise"],
        drop=torch.zeros(len(timestep), dtype=torch.bool) if drop is None else drop,
    )


def target_pixels(golden: Golden) -> Tensor:
    return golden.inputs["forward.image_tensors_dec_u8"].float() / 255


# ---- Variants ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """In what a pass differs from the main one, which is the default."""

    prompt_offset: int | tuple[int, ...] = 0
    """Tokens at the start of a row that do not count in the text loss: of every row, or of each."""
    ignores_text_before_images: bool = False
    """Whether text counts only once its document has begun an image."""
    image_loss_mask: str | None = None
    """Input that says which images count, (I,)."""
    drop_mask: str | None = None
    """Input that says whose conditioning is dropped, (I,)."""
    loss_txt_weight: float
    loss_img_weight: float


def variant(golden: Golden, name: str | None) -> Variant:
    """The variant of a name; None is the main pass.

    Raises:
        ValueError: nothing in the folder says what the variant is, or it has an argument we do not know.
    """
    weights = _only(LOSS_WEIGHTS, LOSS_WEIGHTS | golden.config["model"])
    if name is None:
        return Variant(**weights)
    masks = {mask: f"forward.variant.{name}.{mask}" for mask in ("image_loss_mask", "drop_mask")}
    masks = {mask: key for mask, key in masks.items() if key in golden.inputs}
    is_ignored = name == "ignore_noimage"
    arguments = golden.variant_arguments(name)
    if not (masks or is_ignored or arguments):
        raise ValueError(
            f"config.json: meta.forward.variant_arguments says nothing of the variant {name!r}, "
            "and the inputs hold no mask of it"
        )
    unknown = arguments.keys() - {PROMPT_OFFSET, *LOSS_WEIGHTS}
    if unknown:
        raise ValueError(f"config.json: variant {name!r} has arguments we do not know: {sorted(unknown)}")
    offset = arguments.get(PROMPT_OFFSET, 0)
    return Variant(
        prompt_offset=tuple(offset) if isinstance(offset, list) else offset,
        ignores_text_before_images=is_ignored,
        **masks,
        **_only(LOSS_WEIGHTS, weights | arguments),
    )


def _only(names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in names}


def counted_text(golden: Golden, name: str | None = None) -> Tensor:
    """(B, T) bool: which tokens count in the text loss."""
    tokens, rows, chosen = golden.tokens, batch(golden), variant(golden, name)
    targets = text_targets(
        rows["input_ids"],
        rows["attention_mask"],
        bos=tokens["bos_token_id"],
        pad=tokens["pad_token_id"],
        image_start=tokens["soi_token_id"],
        image=tokens["image_token_id"],
        first_target=_a_row(chosen.prompt_offset, len(rows["input_ids"])),
    )
    if chosen.ignores_text_before_images:
        targets &= targets_after_an_image(rows["input_ids"], tokens["bos_token_id"], tokens["soi_token_id"])
    return targets


def _a_row(offset: int | tuple[int, ...], num_rows: int) -> Tensor:
    """(B, 1) or (1, 1)."""
    if isinstance(offset, tuple) and len(offset) != num_rows:
        raise ValueError(f"{PROMPT_OFFSET}: {len(offset)} numbers, but the batch has {num_rows} rows")
    return torch.tensor(offset).view(-1, 1)


# ---- Steps ---------------------------------------------------------------------------------------


@shared
def reading(golden: Golden) -> dict[str, Any]:
    """What passes through the language model's layers and the image tokenizer; the result as `output`."""
    model = golden.model
    layers = {f"layer{i}": layer for i, layer in enumerate(model.language_model.layers)}
    with recorded(**layers, vision=model.vision) as record:
        output = model(**batch(golden))
    return record | {"output": output}


@shared
def context(golden: Golden) -> tuple[Tensor, Tensor]:
    rows = batch(golden)
    return gathered(
        golden.model, reading(golden)["output"].hidden, rows["image_start"], rows["document_start"]
    )


@shared
def earlier_images(golden: Golden) -> Tensor:
    """(I, K) numbers of the images that the U-Net looks at, -1 for none."""
    rows = batch(golden)
    limit = golden.model.max_context_images
    return context_images(rows["document_start"], rows["image_start"], "previous", limit)


@shared
def latents(golden: Golden) -> tuple[Tensor, DiagonalGaussianDistribution]:
    """Latents of the pictures to be painted, and the distribution that they were drawn from."""
    decoder = golden.model.image_decoder
    with recorded(moments=decoder.vae.quant_conv) as record:
        encoded = decoder.encode(target_pixels(golden), noise(golden).latent_noise)
    return encoded, DiagonalGaussianDistribution(record["moments"])


@shared
def painting(golden: Golden, image_loss_mask: str | None, drop_mask: str | None) -> dict[str, Any]:
    """What passes through the image decoder's parts; the image loss as `loss`.

    Args:
        image_loss_mask, drop_mask: names of inputs, see `Variant`.
    """
    rows, read, decoder = batch(golden), reading(golden), golden.model.image_decoder
    maps = {f"res{i}": block for i, block in enumerate(decoder.synchronizers.skips)}
    ends = {"unet_start": decoder.unet.conv_in, "unet_end": decoder.unet.conv_out}
    with recorded(**maps, **ends, mid=decoder.synchronizers.middle, conditioning=decoder.resampler) as record:
        loss = golden.model.denoising_loss(
            read["output"].hidden,
            read["vision"],
            rows["image_start"],
            TrainingTargets(
                document_start=rows["document_start"],
                image_target=None if image_loss_mask is None else golden.inputs[image_loss_mask].bool(),
                target_pixel_values=target_pixels(golden),
                noise=noise(golden, None if drop_mask is None else golden.inputs[drop_mask].bool()),
            ),
        )
    return record | {"loss": loss}


def main_painting(golden: Golden) -> dict[str, Any]:
    return painting(golden, None, None)


# ---- Outputs: the language model -----------------------------------------------------------------


def embeddings(golden: Golden) -> Tensor:
    return reading(golden)["layer0.in"]


def visible(golden: Golden) -> Tensor:
    rows = batch(golden)
    return visible_images(rows["document_start"], rows["image_start"]).float()


def features_by_row(golden: Golden, sizes: str | None) -> Tensor:
    """Cells that the language model looks into: (B, N, S, C), zero where a row has no image.

    Args:
        sizes: cells along a side of the levels that are shown, such as `16_8`; None: all it looks into.
    """
    shown = golden.config["model"]["spatial_shapes"] if sizes is None else map(int, sizes.split("_"))
    pyramid = {level.shape[-1]: level for level in reading(golden)["vision"].pyramid}
    cells, _ = flatten_pyramid([pyramid[size] for size in shown])
    is_image = batch(golden)["image_start"] != NO_IMAGE
    by_row = cells.new_zeros(*is_image.shape, *cells.shape[1:])
    by_row[is_image] = cells
    return by_row


def layer_inputs(golden: Golden) -> Tensor:
    """Of the layers that the config names, in its order; `final` is what leaves the last norm."""
    names = golden.arguments("forward")["hidden_state_layers"]
    read = reading(golden)
    return torch.stack([read["output"].hidden if n == "final" else read[f"layer{n}.in"] for n in names])


def hidden(golden: Golden) -> Tensor:
    return reading(golden)["output"].hidden


def logits(golden: Golden) -> Tensor:
    return reading(golden)["output"].logits


# ---- Outputs: the image decoder ------------------------------------------------------------------


def context_features(golden: Golden) -> Tensor:
    return context(golden)[0]


def context_mask(golden: Golden) -> Tensor:
    return context(golden)[1]


def conditioning(golden: Golden) -> Tensor:
    return main_painting(golden)["conditioning"]


def seen_features(golden: Golden, level: str) -> Tensor:
    """Maps of the images that the U-Net looks at: (I, K, C, s, s), zero where there is none."""
    index = earlier_images(golden)
    maps = reading(golden)["vision"].pyramid[int(level)][index.clamp(min=0)]
    return maps * (index != NO_IMAGE)[..., None, None, None]


def has_seen(golden: Golden) -> Tensor:
    return (earlier_images(golden) != NO_IMAGE).long()


def seen_image(golden: Golden) -> Tensor:
    return earlier_images(golden)[:, 0]


def posterior(golden: Golden, name: str) -> Tensor:
    return getattr(latents(golden)[1], name)


def clean_latents(golden: Golden) -> Tensor:
    return latents(golden)[0]


def noisy_latents(golden: Golden) -> Tensor:
    return main_painting(golden)["unet_start.in"]


def prediction(golden: Golden) -> Tensor:
    return main_painting(golden)["unet_end"]


def prediction_without_images(golden: Golden) -> Tensor:
    decoder, timestep = golden.model.image_decoder, noise(golden).timestep
    return decoder.predict(noisy_latents(golden), timestep, conditioning(golden), None)


def synchronized_map(golden: Golden, place: str, side: str) -> Tensor:
    return main_painting(golden)[{"in": f"{place}.in", "mmfs_delta": place}[side]]


def loss_an_image(golden: Golden) -> Tensor:
    return squared_errors(prediction(golden), noise(golden).noise).flatten(1).mean(1)


# ---- Outputs: losses, of the main pass and of variants -------------------------------------------


def labels(golden: Golden, name: str | None = None) -> Tensor:
    return next_token_labels(batch(golden)["input_ids"], counted_text(golden, name))[:, :-1]


def loss_of_text(golden: Golden, name: str | None = None) -> Tensor:
    return text_loss(logits(golden), batch(golden)["input_ids"], counted_text(golden, name))


def loss_of_images(golden: Golden, name: str | None = None) -> Tensor:
    chosen = variant(golden, name)
    return painting(golden, chosen.image_loss_mask, chosen.drop_mask)["loss"]


def loss(golden: Golden, name: str | None = None) -> Tensor:
    chosen = variant(golden, name)
    return chosen.loss_txt_weight * loss_of_text(golden, name) + chosen.loss_img_weight * loss_of_images(
        golden, name
    )


def variant_prediction(golden: Golden, name: str) -> Tensor:
    chosen = variant(golden, name)
    return painting(golden, chosen.image_loss_mask, chosen.drop_mask)["unet_end"]


OUTPUTS = {
    r"forward\.mm_embeds": embeddings,
    r"forward\.cross_attention_mask": visible,
    r"forward\.mmfs_features_mm(?:\.level([\d_]+))?": features_by_row,
    r"forward\.llm_hidden_states": layer_inputs,
    r"forward\.mm_hidden_state": hidden,
    r"forward\.text_logits": logits,
    r"forward\.gt_text_ids": labels,
    r"forward\.context_features": context_features,
    r"forward\.context_attention_mask": context_mask,
    r"forward\.perceiver_out": conditioning,
    r"forward\.mmfs_features\.(\d+)": seen_features,
    r"forward\.mmfs_mask": has_seen,
    r"forward\.mmfs_context_image_index": seen_image,
    r"forward\.vae_(mean|logvar)": posterior,
    r"forward\.latents": clean_latents,
    r"forward\.noisy_latents": noisy_latents,
    r"forward\.unet_pred": prediction,
    r"forward\.unet_pred_without_mmfs": prediction_without_images,
    r"forward\.unet_debug\.(res\d+|mid)_(in|mmfs_delta)": synchronized_map,
    r"forward\.loss": loss,
    r"forward\.loss_txt": loss_of_text,
    r"forward\.loss_img": loss_of_images,
    r"forward\.loss_img_per_image_unmasked": loss_an_image,
    r"forward\.variant\.([^.]+)\.gt_text_ids": labels,
    r"forward\.variant\.([^.]+)\.loss_txt": loss_of_text,
    r"forward\.variant\.([^.]+)\.loss_img": loss_of_images,
    r"forward\.variant\.([^.]+)\.loss": loss,
    r"forward\.variant\.([^.]+)\.unet_pred": variant_prediction,
}
