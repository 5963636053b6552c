"""Our side of a golden folder: one function a group of outputs, each returning tensors under the golden
keys.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager

import torch
from golden import Golden
from torch import Tensor
from torch.nn import functional as F

from by_ids import document_starts, text_targets
from mm_interleaved.generation.diffusion import build_scheduler, denoise
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import TextRules, generate_text_batch, score_options
from mm_interleaved.models.context import add_distances, gather_contexts
from mm_interleaved.models.image_decoder import DiffusionDraws
from mm_interleaved.models.losses import denoising_errors
from mm_interleaved.models.synchronizer import flatten_pyramid
from mm_interleaved.visibility import (
    NO_IMAGE,
    context_images,
    next_token_labels,
    relative_image_index,
    visible_images,
)


@contextmanager
def recorded(**modules: torch.nn.Module):
    """Outputs of modules while they run: `record["name"]` is the last output, `record["name.in"]` the first
    input.
    """
    record: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, arguments, keywords, output):
            record[f"{name}.in"] = arguments[0] if arguments else keywords["hidden_states"]
            record[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


# ---- Vision --------------------------------------------------------------------------------------


def vision(golden: Golden) -> dict[str, Tensor]:
    tower = golden.model.vision
    interactions = tower.adapter.interactions
    modules = {
        "pre": tower.clip.pre_norm,
        "spatial": tower.adapter.spatial_prior,
        "resampler": tower.resampler,
    }
    modules |= {f"injector{i}": interaction.injector for i, interaction in enumerate(interactions)}
    modules |= {f"interaction{i}": interaction for i, interaction in enumerate(interactions)}
    with recorded(**modules) as record:
        features = tower(golden.inputs["forward.image_tensors_u8"].float() / 255)

    last_tokens = record[f"interaction{len(interactions) - 1}"][0]
    out = {
        "vt.vis_embed": features.slots,
        "vt.image_embeds": (last_tokens[:, 1:] + tower.position_table[1:])[:1],
        "vt.debug.pre_layrnorm": record["pre"][:1],
        "vt.debug.encoder_last_hidden_state": last_tokens[:1],
        "vt.debug.perceiver_out": record["resampler"],
    }
    for i, level in enumerate(features.pyramid):
        out[f"vt.multiscale_features.{i}"] = level[:1]
    for i, level in enumerate(record["spatial"]):
        out[f"vt.debug.spm_c{i + 1}"] = level[:1].flatten(2).transpose(1, 2)
    for i in range(len(interactions)):
        tokens, cells = record[f"interaction{i}"]
        out[f"vt.debug.injector{i}_out"] = record[f"injector{i}"][:1]
        out[f"vt.debug.interaction{i}_x"] = tokens[:1, 1:]
        out[f"vt.debug.interaction{i}_cls"] = tokens[:1, :1]
        out[f"vt.debug.interaction{i}_c"] = cells[:1]
    return out


# ---- One training pass ---------------------------------------------------------------------------

# Arguments of the variants, which the folder's config names only in words (GOLDEN.md, section 3).
PROMPT_OFFSETS = {"prompt_offset_int": 7, "prompt_offset_list": (4, 9)}
WEIGHTS = {"text": 0.5, "image": 2.0}


def forward(golden: Golden) -> dict[str, Tensor]:
    model, inputs = golden.model, golden.inputs
    ids, mask = inputs["forward.text_ids"], inputs["forward.attention_mask"]
    image_start = golden.image_start(ids)
    document_start = document_starts(ids, golden.tokens["bos_token_id"])
    pixels = inputs["forward.image_tensors_u8"].float() / 255
    target_pixels = inputs["forward.image_tensors_dec_u8"].float() / 255
    draws = DiffusionDraws(
        timestep=inputs["forward.timesteps"],
        noise=inputs["forward.diffusion_noise"],
        latent_noise=inputs["forward.vae_sample_noise"],
        drop=torch.zeros(len(pixels), dtype=torch.bool),
    )
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "image_start": image_start,
        "document_start": document_start,
        "pixel_values": pixels,
        "target_pixel_values": target_pixels,
    }
    targets = _text_targets(golden, ids, mask)

    layers = {f"layer{i}": layer for i, layer in enumerate(model.language_model.layers)}
    decoder = model.image_decoder
    maps = {f"res{i}": block for i, block in enumerate(decoder.synchronizers.skips)}
    with recorded(
        **layers, **maps, mid=decoder.synchronizers.middle, resampler=decoder.resampler, tower=model.vision
    ) as record:
        output = model(**batch, text_target=targets, draws=draws)
    features = record["tower"]
    out = {
        "forward.mm_embeds": record["layer0.in"],
        "forward.cross_attention_mask": visible_images(document_start, image_start).float(),
        "forward.mm_hidden_state": output.hidden,
        "forward.text_logits": output.logits,
        "forward.gt_text_ids": next_token_labels(ids, targets)[:, :-1],
        "forward.perceiver_out": record["resampler"],
        "forward.loss": output.loss,
        "forward.loss_txt": output.text_loss,
        "forward.loss_img": output.image_loss,
    }
    named_layers = golden.meta["forward"]["hidden_state_layers"]
    out["forward.llm_hidden_states"] = torch.stack(
        [output.hidden if name == "final" else record[f"layer{name}.in"] for name in named_layers]
    )
    out |= _language_features(golden, features.pyramid, image_start)
    out |= _contexts(golden, output.hidden, image_start, document_start)
    out |= _painting(golden, features.pyramid, image_start, document_start, record, draws, target_pixels)
    out |= _variants(golden, batch, draws, targets)
    return out


def _text_targets(golden: Golden, ids: Tensor, mask: Tensor, first_target=0) -> Tensor:
    tokens = golden.tokens
    names = {
        "bos": "bos_token_id",
        "pad": "pad_token_id",
        "image_start": "soi_token_id",
        "image": "image_token_id",
    }
    special = {ours: tokens[official] for ours, official in names.items()}
    first = torch.tensor(first_target).view(-1, 1)
    return text_targets(ids, mask, **special, first_target=first)


def _language_features(golden: Golden, pyramid, image_start: Tensor) -> dict[str, Tensor]:
    """Features the language model looks into, by row, for whichever levels the key names."""
    out = {}
    for key in golden.outputs:
        named = re.fullmatch(r"forward\.mmfs_features_mm\.level([\d_]+)", key)
        if named or key == "forward.mmfs_features_mm":
            sizes = (
                [int(size) for size in named[1].split("_")]
                if named
                else golden.config["model"]["spatial_shapes"]
            )
            cells, _ = flatten_pyramid([level for level in pyramid if level.shape[-1] in sizes])
            by_row = cells.new_zeros(*image_start.shape, *cells.shape[1:])
            by_row[image_start != NO_IMAGE] = cells
            out[key] = by_row
    return out


def _contexts(golden: Golden, hidden: Tensor, image_start: Tensor, document_start: Tensor, prefix="forward"):
    row, column = (image_start != NO_IMAGE).nonzero(as_tuple=True)
    end = image_start[row, column]
    context, mask = gather_contexts(hidden, row, document_start[row, end], end)
    return {
        f"{prefix}.context_features": add_distances(golden.model.context_projection(context)),
        f"{prefix}.context_attention_mask": mask.long(),
    }


def _painting(
    golden, pyramid, image_start, document_start, record, draws, target_pixels
) -> dict[str, Tensor]:
    model, decoder = golden.model, golden.model.image_decoder
    index = context_images(document_start, image_start, "previous", model.max_context_images)
    posterior = decoder.vae.encode(2 * target_pixels - 1).latent_dist
    latents = decoder.encode(target_pixels, draws.latent_noise)
    noisy = model.training_scheduler.add_noise(latents, draws.noise, draws.timestep)
    conditioning = record["resampler"]
    prediction = decoder.predict(noisy, draws.timestep, conditioning, model.look_at(pyramid, index))
    out = {
        "forward.mmfs_mask": (index != NO_IMAGE).long(),
        "forward.mmfs_context_image_index": index[:, 0],
        "forward.vae_mean": posterior.mean,
        "forward.vae_logvar": posterior.logvar,
        "forward.latents": latents,
        "forward.noisy_latents": noisy,
        "forward.unet_pred": prediction,
        "forward.unet_pred_without_mmfs": decoder.predict(noisy, draws.timestep, conditioning, None),
        "forward.loss_img_per_image_unmasked": denoising_errors(prediction, draws.noise),
    }
    seen = (index != NO_IMAGE)[..., None, None, None]
    for i, level in enumerate(pyramid):
        out[f"forward.mmfs_features.{i}"] = level[index.clamp(min=0)] * seen
    for name in (*[f"res{i}" for i in range(len(decoder.synchronizers.skips))], "mid"):
        out[f"forward.unet_debug.{name}_in"] = record[f"{name}.in"]
        out[f"forward.unet_debug.{name}_mmfs_delta"] = record[name]
    return out


def _variants(golden: Golden, batch: dict, draws: DiffusionDraws, targets: Tensor) -> dict[str, Tensor]:
    model, ids, mask = golden.model, batch["input_ids"], batch["attention_mask"]
    config, out = model.config, {}
    for name in golden.cases("forward.variant"):
        variant_targets, variant = targets, dict(batch, draws=draws)
        text_weight, image_weight = config.text_loss_weight, config.image_loss_weight
        if name in PROMPT_OFFSETS:
            variant_targets = _text_targets(golden, ids, mask, PROMPT_OFFSETS[name])
        elif name == "ignore_noimage":
            variant_targets = _targets_after_image(golden, ids, targets, batch["document_start"])
        elif name == "image_loss_mask":
            variant["image_target"] = golden.inputs[f"forward.variant.{name}.image_loss_mask"].bool()
        elif name == "weights":
            text_weight, image_weight = WEIGHTS["text"], WEIGHTS["image"]
        elif name == "uncond":
            drop = golden.inputs[f"forward.variant.{name}.drop_mask"].bool()
            variant["draws"] = draws._replace(drop=drop)
        with recorded(unet=model.image_decoder.unet.conv_out) as record:
            output = model(**variant, text_target=variant_targets)
        prefix = f"forward.variant.{name}"
        out |= {
            f"{prefix}.loss_txt": output.text_loss,
            f"{prefix}.loss_img": output.image_loss,
            f"{prefix}.loss": text_weight * output.text_loss + image_weight * output.image_loss,
            f"{prefix}.gt_text_ids": next_token_labels(ids, variant_targets)[:, :-1],
            f"{prefix}.unet_pred": record["unet"],
        }
    return out


def _targets_after_image(golden: Golden, ids: Tensor, targets: Tensor, document_start: Tensor) -> Tensor:
    """Text counts only once its document has shown an image; image starts and eos always keep counting."""
    images_so_far = (ids == golden.tokens["soi_token_id"]).cumsum(1)
    images_before_document = F.pad(images_so_far, (1, 0)).gather(1, document_start)
    always = (ids == golden.tokens["soi_token_id"]) | (ids == golden.tokens["eos_token_id"])
    return targets & ((images_so_far > images_before_document) | always)


# ---- The synchronizer alone ----------------------------------------------------------------------


def language_synchronizer(golden: Golden) -> dict[str, Tensor]:
    out, model = {}, golden.model
    level_sizes = tuple(golden.config["model"]["spatial_shapes"])
    for case in golden.cases("mmfs_llm"):
        query = golden.inputs[f"mmfs_llm.{case}.query"]
        cells = golden.inputs[f"mmfs_llm.{case}.features_i8"].float() / 32
        visible = golden.inputs[f"mmfs_llm.{case}.mask"].bool()
        if visible.shape[1] != query.shape[1]:
            visible = visible[:, -1:].expand(-1, query.shape[1], -1)
        for index in model.language_model.synchronized_layers:
            gated = model.language_model.layers[index].synchronizer
            prefix = f"mmfs_llm.{case}.layer{index}"
            core = gated.synchronizer
            out[f"{prefix}.mmfs_core_out"] = core(query, core.project_cells(cells, level_sizes), visible)
            out[f"{prefix}.cross_attn_out"] = gated(query, gated.project_cells(cells, level_sizes), visible)
            plan = core.plan(query, visible)
            out[f"{prefix}.debug.sampling_locations"] = plan.location
            out[f"{prefix}.debug.point_weights"] = plan.weight
    return out


def unet_synchronizer(golden: Golden) -> dict[str, Tensor]:
    out, synchronizers = {}, golden.model.image_decoder.synchronizers
    pool = [
        golden.inputs[key].float() / 32 for key in sorted(golden.inputs) if key.startswith("mmfs_sd.pool_i8.")
    ]
    for case in golden.cases("mmfs_sd"):
        name = golden.meta[f"mmfs_sd.{case}"]["block"]
        block = synchronizers.middle if name == "mid" else synchronizers.skips[int(name)]
        index = golden.inputs[f"mmfs_sd.{case}.image_index"]
        cells, level_sizes = flatten_pyramid([level[index] for level in pool])
        visible = golden.inputs[f"mmfs_sd.{case}.mask"].bool()
        values = block.project_cells(cells, level_sizes)
        out[f"mmfs_sd.{case}.block_out"] = block(
            golden.inputs[f"mmfs_sd.{case}.sample"], values, relative_image_index(visible)
        )
    return out


# ---- Text ----------------------------------------------------------------------------------------

# Defaults of the official generation functions (GOLDEN.md, section 4.9).
TEXT_DEFAULTS = {"num_beams": 5, "max_length": 30, "min_length": 8, "top_p": 0.9, "temperature": 1.0}


def text(golden: Golden) -> dict[str, Tensor]:
    out = {}
    ids = golden.inputs["gen_text.text_ids"]
    for case in golden.cases("gen_text"):
        arguments = TEXT_DEFAULTS | golden.meta[f"gen_text.{case}"]
        samples = arguments.get("use_nucleus_sampling", False)
        settings = GenerationSettings(
            num_beams=1 if samples else arguments["num_beams"],
            do_sample=samples,
            top_p=arguments["top_p"],
            temperature=arguments["temperature"],
            repetition_penalty=arguments.get("repetition_penalty", 1.0),
            length_penalty=arguments.get("length_penalty", 1.0),
        )
        rules = TextRules(
            stop_ids=(golden.tokens["eos_token_id"], golden.tokens["soi_token_id"]),
            max_new_tokens=arguments["max_length"],
            # The official minimum counts the bos that decoding starts with.
            min_new_tokens=arguments["min_length"] - 1,
        )
        seed = arguments.get("torch_manual_seed")
        written = generate_text_batch(
            golden.model,
            ids,
            golden.inputs["gen_text.attention_mask"],
            golden.pixels(golden.inputs["gen_text.image_index"]),
            golden.image_start(ids),
            settings,
            rules,
            num_return_sequences=arguments.get("num_captions", 1),
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            output_logits=f"gen_text.{case}.step_logits" in golden.outputs,
        )
        out[f"gen_text.{case}.text_ids"] = written.ids
        if written.logits is not None:
            out[f"gen_text.{case}.step_logits"] = torch.stack(written.logits)
        if written.hypothesis_scores is not None:
            out[f"gen_text.{case}.sequence_scores"] = written.sequence_scores
            out[f"gen_text.{case}.final_hypothesis_scores"] = written.hypothesis_scores
    return out


def scores(golden: Golden) -> dict[str, Tensor]:
    inputs, rows, image = golden.inputs, [], 0
    prompts = sorted(int(key.split(".")[-1]) for key in inputs if key.startswith("scores.text_ids."))
    for i in prompts:
        mask = inputs[f"scores.attention_mask.{i}"].bool()
        session = InterleavedSession(golden.model)
        ids = inputs[f"scores.text_ids.{i}"][mask].tolist()
        slots = golden.model.config.num_slots
        while ids:
            if ids[0] == golden.tokens["soi_token_id"]:
                session.append_image(golden.pixels(inputs["scores.image_index"][image : image + 1]))
                ids, image = ids[1 + slots :], image + 1
            else:
                session.append_text(ids[:1])
                ids = ids[1:]
        options = inputs[f"scores.options_ids.{i}"]
        lengths = inputs[f"scores.options_attn_masks.{i}"].sum(1)
        options = [option[:length].tolist() for option, length in zip(options, lengths, strict=True)]
        rows.append(score_options(session, options))
    return {"scores.scores": torch.stack(rows)[:, None]}


# ---- Pictures ------------------------------------------------------------------------------------

# The official pipeline paints at most so many pictures at once, and its generator runs on from batch to
# batch.
PICTURES_AT_ONCE = 8


def pictures(golden: Golden) -> dict[str, Tensor]:
    model, inputs = golden.model, golden.inputs
    ids = inputs["gen_image.text_ids"]
    image_start = golden.image_start(ids)
    one_document = torch.zeros_like(ids)  # the official generation takes a row for one document
    pixels = golden.pixels(inputs["gen_image.image_index"])
    hidden = model(
        input_ids=ids,
        attention_mask=inputs["gen_image.attention_mask"],
        pixel_values=pixels,
        image_start=image_start,
    ).hidden
    pyramid = model.encode_images(pixels).pyramid
    row, column = (image_start != NO_IMAGE).nonzero(as_tuple=True)
    end = image_start[row, column]
    conditioning, _ = model.condition(hidden, row, torch.zeros_like(end), end)
    index = context_images(one_document, image_start, "previous", model.max_context_images)
    out = _contexts(golden, hidden, image_start, one_document, prefix="gen_image")
    for case in golden.cases("gen_image"):
        if f"gen_image.{case}" in golden.meta:
            out |= _painted(golden, case, conditioning, pyramid, index)
    return out


def _painted(golden: Golden, case: str, conditioning: Tensor, pyramid, index: Tensor) -> dict[str, Tensor]:
    model, prefix, arguments = golden.model, f"gen_image.{case}", golden.meta[f"gen_image.{case}"]
    targets = golden.inputs.get(f"{prefix}.target_image_idxs", torch.arange(len(conditioning)))
    conditioning, index = conditioning[targets], index[targets]
    seen = (index != NO_IMAGE).long()
    rounds = arguments.get("num_validation_images", 1)
    guidance = arguments["guidance_scale"]
    out = {
        f"{prefix}.perceiver_out": conditioning,
        f"{prefix}.mmfs_mask_in_unet": torch.cat([seen, seen]) if guidance > 1 else seen,
    }
    images, decoder = [], model.image_decoder
    for number in range(rounds):
        suffix = f".val{number}" if rounds > 1 else ""
        seed = golden.config["model"]["image_decoder_config"]["sd_base_seed"] + number
        generator, finished, traces = torch.Generator().manual_seed(seed), [], []
        for first in range(0, len(targets), PICTURES_AT_ONCE):
            own = slice(first, first + PICTURES_AT_ONCE)
            shape = golden.inputs[f"{prefix}.initial_latents{suffix}"][own].shape
            noise = torch.randn(shape, generator=generator)
            steps = denoise(
                decoder,
                build_scheduler(arguments["scheduler"], model.config.scheduler_config),
                noise,
                conditioning[own],
                model.look_at(pyramid, index[own]),
                num_inference_steps=arguments["num_inference_steps"],
                guidance_scale=guidance,
                generator=generator,
            )
            latents_in, predictions, latents = [], [], noise
            for step in steps:
                latents_in.append(latents)
                predictions.append(step.prediction)
                latents = step.latents
            finished.append(latents)
            traces.append((torch.stack(latents_in), torch.stack(predictions)))
        latents = torch.cat(finished)
        out[f"{prefix}.final_latents{suffix}"] = latents
        out[f"{prefix}.trace.latents_in"], out[f"{prefix}.trace.unet_out"] = traces[0]
        images.append(decoder.decode(latents))
    out[f"{prefix}.image_first"] = images[0][:1]
    # The official rounding: x * 255 + 0.5, cut.
    out[f"{prefix}.image_u8"] = (torch.cat(images) * 255 + 0.5).to(torch.uint8)
    return out


# ---- Small things --------------------------------------------------------------------------------


def vae_decode(golden: Golden) -> dict[str, Tensor]:
    return {
        "vae_decode.image_raw": golden.model.image_decoder.vae.decode(
            golden.inputs["vae_decode.latents"]
        ).sample
    }


def schedule(golden: Golden) -> dict[str, Tensor]:
    scheduler = golden.model.training_scheduler
    return {"schedule.betas": scheduler.betas, "schedule.alphas_cumprod": scheduler.alphas_cumprod}


PRODUCERS: dict[str, Callable[[Golden], dict[str, Tensor]]] = {
    "vt.": vision,
    "forward.": forward,
    "gen_text.": text,
    "scores.": scores,
    "gen_image.": pictures,
    "mmfs_llm.": language_synchronizer,
    "mmfs_sd.": unet_synchronizer,
    "vae_decode.": vae_decode,
    "schedule.": schedule,
}
