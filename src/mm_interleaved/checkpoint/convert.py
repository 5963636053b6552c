"""The official checkpoint and ours, both ways, one shard in memory at a time.

official shards -> key map -> a folder for `from_pretrained`, with configuration and processor
such a folder   -> key map -> official shards
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mm_interleaved.checkpoint.components import Components, find_components
from mm_interleaved.checkpoint.key_map import KeyReport, compare_keys, from_official, to_official
from mm_interleaved.checkpoint.load import (
    DTYPES,
    model_file_errors,
    model_shapes,
    read_model_config,
    refuse_names,
    refuse_unfit,
)
from mm_interleaved.checkpoint.official_files import Shard, open_checkpoint
from mm_interleaved.checkpoint.released_config import RELEASED, official_settings, released_config
from mm_interleaved.checkpoint.shard_writer import GIGABYTE, ShardWriter
from mm_interleaved.checkpoint.tokenizer import load_released_tokenizer
from mm_interleaved.errors import ModelFileError, StorageError, UsageError, escape
from mm_interleaved.files import new_folder, write_file
from mm_interleaved.model_files.headers import read_index, read_json, tensor_headers
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.positions import resize_grid_table
from mm_interleaved.spelling import hint
from mm_interleaved.tokens.processor import MMInterleavedProcessor

logger = logging.getLogger(__name__)

# Tables of positions, class token first, that follow the resolution of the encoder.
_POSITION_TABLES = ("vision.clip.embeddings.position_embedding.weight", "vision.position_table")


def dry_run(path: Path, *, components: Path | None = None) -> KeyReport:
    """Compare official names (and shapes, where the files state them) with our model; no weight is read.

    Args:
        path: a manifest (`state_dict` and configurations as JSON), an index of shards, a file or folder of
            weights.
        components: folders of the stock parts, whose configurations say how large the model is.

    Raises:
        ModelFileError: the files cannot be read, or describe no model.
    """
    if path.is_file() and path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            with model_file_errors(path):
                shapes = {name: tuple(entry["shape"]) for name, entry in content["state_dict"].items()}
            return compare_keys(shapes, model_shapes(_config_of_manifest(path, content)))
        names = _names_of_index(path)
        return compare_keys(names, model_shapes(_official_config(path.parent, _find(components))))
    shapes = {name: shape for shard in open_checkpoint(path) for name, shape in shard.shapes.items()}
    folder = path if path.is_dir() else path.parent
    return compare_keys(shapes, model_shapes(_official_config(folder, _find(components))))


def refuse_misfit(report: KeyReport, place: Path) -> None:
    """Raise ModelFileError, naming what does not fit, if anything does not."""
    refuse_names(str(place), missing=report.missing, unexpected=report.unexpected, misshapen=report.misshapen)


def convert_checkpoint(
    official: Path,
    out: Path,
    *,
    components: Path | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    max_shard_bytes: int = 5 * GIGABYTE,
    allow_non_finite: bool = False,
) -> KeyReport:
    """Write the official checkpoint as a folder that `from_pretrained` loads.

    Args:
        official: folder (or file) of the released weights, `.bin` or safetensors, with or without an index.
        out: a new or empty folder; it is whole or not there.
        components: folders of the stock parts: their configurations and the tokenizer.
        dtype: "float32", "bfloat16" or "float16"; default: each tensor as found.
        image_size: pixels a side for the encoder, if other than released: position tables are resized.
        max_shard_bytes: size of the written shards.
        allow_non_finite: take NaN and infinite weights too.

    Raises:
        ModelFileError: the files are damaged, unsafe, incomplete, or not of this model.
        StorageError: the disk failed or is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype: found {escape(dtype)!r}, {hint(dtype, DTYPES)}", field="dtype")
    parts = _find(components)
    config = _official_config(official if official.is_dir() else official.parent, parts)
    shards = open_checkpoint(official)
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    report = compare_keys(shapes, model_shapes(config))
    refuse_misfit(report, official)
    config = _at_image_size(config, image_size)
    processor = _processor(config, parts)
    _refuse_full_disk(out, sum(shard.path.stat().st_size for shard in shards))

    with new_folder(out) as folder:
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        grid_size = config.vision_config.image_size // config.vision_config.patch_size
        counted: dict[torch.dtype, int] = {}
        for name, tensor in _mapped(shards, allow_non_finite=allow_non_finite):
            if name in _POSITION_TABLES:
                tensor = _resize_positions(tensor, grid_size)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(DTYPES[dtype])
            counted[tensor.dtype] = counted.get(tensor.dtype, 0) + tensor.numel()
            writer.add(name, tensor)
        writer.finish()
        config.architectures = ["MMInterleavedForConditionalGeneration"]
        config.dtype = max((kind for kind in counted if kind.is_floating_point), key=counted.__getitem__)
        config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return report


def export_official(
    model: Path, out: Path, *, kind: str = "safetensors", max_shard_bytes: int = 5 * GIGABYTE
) -> None:
    """Write a folder of ours under official names, with its settings in `config.json` for the way back.

    Args:
        kind: "safetensors", or "bin" for the official loader.

    Raises:
        ModelFileError: the folder holds no whole model, or one that the official code has no names for.
        StorageError: the disk failed or is full.
    """
    if kind not in ("safetensors", "bin"):
        raise UsageError(f"kind: found {escape(kind)!r}, expected safetensors or bin", field="kind")
    config = read_model_config(model)
    headers = tensor_headers(model)
    refuse_unfit(str(model), model_shapes(config), {name: header.shape for name, header in headers.items()})
    settings = _settings_on_export(config, model)
    _refuse_full_disk(out, sum(header.num_bytes for header in headers.values()))
    with new_folder(out) as folder:
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes, kind=kind)
        for path in sorted({model / header.file for header in headers.values()}):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    for official, tensor in to_official({name: file.get_tensor(name)}).items():
                        writer.add(official, tensor)
        writer.finish()
        write_file(folder / "config.json", json.dumps(settings, indent=2).encode() + b"\n")


def _mapped(shards: tuple[Shard, ...], *, allow_non_finite: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under our name, checked."""
    for shard in shards:
        for official, tensor in shard.tensors():
            if tensor.is_floating_point() and not allow_non_finite and not bool(tensor.isfinite().all()):
                raise ModelFileError(f"{shard.path}: {escape(official)} holds NaN or infinite values")
            mapped = from_official(official, tensor)
            if mapped is None:
                continue
            # A vector of zeros is usual (a bias, the ignored value); a matrix of zeros was never trained.
            if mapped[1].ndim > 1 and not bool(tensor.any()):
                logger.warning("%s: %s is zero throughout", shard.path, official)
            yield mapped


def _config_of_manifest(path: Path, manifest: dict[str, Any]) -> MMInterleavedConfig:
    with model_file_errors(path):
        arguments, defaults = manifest["model_config_yaml"], dict(manifest["constructor_defaults"])
        image_decoder = {**defaults.pop("image_decoder"), **arguments["image_decoder_config"]}
        return released_config(
            llm=manifest["llm_config"],
            clip=manifest["clip_vision_config"],
            unet=manifest["unet_config"],
            vae=manifest["vae_config"],
            scheduler=manifest["scheduler_config"],
            model={**defaults, **arguments, "image_decoder_config": image_decoder},
        )


def _names_of_index(path: Path) -> dict[str, None]:
    """Names alone: the shards of an index need not be there for a dry run."""
    return dict.fromkeys(read_index(path))


def _find(components: Path | None) -> Components:
    return Components() if components is None else find_components(components)


def _official_config(folder: Path, parts: Components) -> MMInterleavedConfig:
    """The released numbers, those of the component folders over them, those beside the weights over all."""
    settings = {**RELEASED, **parts.settings}
    if parts.settings:
        settings["model"] = _fitted(settings)
    own = folder / "config.json"
    if own.is_file():
        found = read_json(own)
        found = found if isinstance(found, dict) else {}
        settings.update({part: found[part] for part in RELEASED if isinstance(found.get(part), dict)})
        scheduler = (found.get("effective") or {}).get("scheduler")
        if scheduler is not None:
            settings["scheduler"] = scheduler
    with model_file_errors(folder):
        return released_config(**settings)


def _fitted(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of the official model for other stock parts.

    The two image tokens follow the vocabulary, the last ordinary piece pads, images have the U-Net's size.
    """
    model, vocab_size = settings["model"], settings["llm"]["vocab_size"]
    tokens = {"pad_token_id": vocab_size - 1, "soi_token_id": vocab_size, "image_token_id": vocab_size + 1}
    factor = 2 ** (len(settings["vae"]["block_out_channels"]) - 1)
    image_size = settings["unet"]["sample_size"] * factor
    return {
        **model,
        "txt_vocab_size": vocab_size + 2,
        "image_embed_dim": settings["clip"]["hidden_size"],
        "special_token_dict": {**model["special_token_dict"], **tokens},
        "image_decoder_config": {**model["image_decoder_config"], "image_size": image_size},
    }


def _settings_on_export(config: MMInterleavedConfig, model: Path) -> dict[str, Any]:
    """Official settings, if they lead back to the same model: the official code hard-codes the rest."""
    problem = f"{model}: is not of the released shape, so the official code cannot take its weights"
    try:
        settings = official_settings(config)
        again = released_config(**settings)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ModelFileError(problem) from error
    if model_shapes(again) != model_shapes(config):
        raise ModelFileError(problem)
    return json.loads(json.dumps(settings, default=str))


def _at_image_size(config: MMInterleavedConfig, image_size: int | None) -> MMInterleavedConfig:
    if image_size is None:
        return config
    step = 2 * config.vision_config.patch_size
    if image_size < step or image_size % step:
        raise UsageError(f"image_size: found {image_size}, expected a multiple of {step} (two patches)")
    changed = MMInterleavedConfig.from_dict(config.to_dict())
    changed.vision_config.image_size = image_size
    return changed


def _resize_positions(table: Tensor, grid_size: int) -> Tensor:
    patches = resize_grid_table(table[1:], (grid_size, grid_size))
    return torch.cat([table[:1], patches])


def _processor(config: MMInterleavedConfig, parts: Components) -> MMInterleavedProcessor | None:
    """Tokenizer and image rule, if the components bring a tokenizer."""
    if parts.tokenizer is None:
        logger.warning(
            "no tokenizer among the components: the folder will hold a model without its processor"
        )
        return None
    unet, vae = config.unet_config, config.vae_config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return MMInterleavedProcessor(
        load_released_tokenizer(parts.tokenizer, config),
        config.vision_config.image_size,
        unet["sample_size"] * factor,
        config.num_slots,
        special_ids={
            "image_start": config.image_start_token_id,
            "image": config.image_token_id,
            "bos": config.bos_token_id,
            "eos": config.eos_token_id,
            "pad": config.pad_token_id,
        },
    )


def _refuse_full_disk(out: Path, needed: int) -> None:
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(f"{out}: the disk is full, {needed} bytes are needed and {free} free")
