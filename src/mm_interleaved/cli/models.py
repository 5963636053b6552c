"""`info`, `convert`, `compose`: what a model is, and where models come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.output import say
from mm_interleaved.errors import UsageError


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (info, convert, compose):
        command(app, panel="Models")(function)


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="storyworld, a folder, or a hub id.")
    ] = "storyworld",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
):
    """What a model is: parts, parameters, sizes, limits. No weight is read."""
    description = describe_model(model)
    if as_json:
        say(json.dumps(description, indent=2))
        return
    say(f"{description['model']}  ({description['folder']})")
    say()
    for name, part in description["parts"].items():
        say(_size_line(name, part))
    total = description["total"]
    say(_size_line("total", {**total, "dtypes": ""}))
    say()
    for name, value in description["limits"].items():
        say(f"  {name.replace('_', ' '):<28} {value}")
    if description["generation_settings"]:
        say(f"  {'generation settings':<28} {json.dumps(description['generation_settings'])}")


def describe_model(name: str) -> dict[str, Any]:
    """Parts, parameter counts, sizes and limits of a model, from its configuration and file headers."""
    from mm_interleaved.generation.defaults import generation_defaults
    from mm_interleaved.model_files.config import read_config
    from mm_interleaved.model_files.headers import tensor_headers
    from mm_interleaved.model_files.resolve import find_model

    folder = find_model(name)
    config = read_config(folder)
    headers = tensor_headers(folder)
    parts: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, Counter[str]] = {}
    for tensor, header in headers.items():
        part = part_of(tensor)
        counted = parts.setdefault(part, {"parameters": 0, "bytes": 0})
        counted["parameters"] += _product(header.shape)
        counted["bytes"] += header.num_bytes
        dtypes.setdefault(part, Counter())[header.dtype] += 1
    for part, found in dtypes.items():
        parts[part]["dtypes"] = " ".join(found)
    return {
        "model": name,
        "folder": str(folder),
        "parts": parts,
        "total": {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")},
        "limits": model_limits(config),
        "generation_settings": generation_defaults(config),
    }


def part_of(tensor: str) -> str:
    """The part of the model that a tensor belongs to: the name of its first module, two for a container."""
    names = tensor.split(".")
    return ".".join(names[:2]) if names[0] in ("model", "image_decoder") and len(names) > 2 else names[0]


def model_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a configuration that bound a document."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    unet, vae = config.get("unet_config") or {}, config.get("vae_config") or {}
    # A synchronizer sees fewer images than its table of relative indices has rows.
    rows = {side: (config.get(f"{side}_synchronizer") or {}).get("max_images") for side in ("text", "image")}
    limits = {
        "context_tokens": text.get("max_position_embeddings"),
        "tokens_per_image": (config.get("slot_resampler") or {}).get("num_queries"),
        "images_a_document": None if rows["text"] is None else rows["text"] - 1,
        "images_the_image_decoder_sees": None if rows["image"] is None else rows["image"] - 1,
        "image_input_pixels": vision.get("image_size"),
        "image_output_pixels": _output_pixels(unet, vae),
        "vocabulary": text.get("vocab_size"),
        "context_images": config.get("context_images"),
    }
    return {name: value for name, value in limits.items() if value is not None}


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="OFFICIAL_DIR", help="Released shards; with --dry-run also an index or manifest."
        ),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the model.")] = None,
    components: Annotated[
        Path | None,
        typer.Option(help="Folders of the stock parts (LLM, CLIP, diffusion), if not in OFFICIAL_DIR."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Save as float32, bfloat16 or float16; as found by default.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side for the encoder, if other than released.")
    ] = None,
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Take NaN and infinite weights too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only map the names and report what does not fit.")
    ] = False,
):
    """Turn the official checkpoint into a folder that --model takes."""
    from mm_interleaved.checkpoint import convert as conversion

    if dry_run:
        report = conversion.dry_run(source, components=components)
        say(str(report))
        conversion.refuse_misfit(report, source)
        return
    if out is None:
        raise UsageError("convert: expected OUT, the folder to write (or --dry-run)")
    report = conversion.convert_checkpoint(
        source,
        out,
        components=components,
        dtype=dtype,
        image_size=image_size,
        allow_non_finite=allow_non_finite,
    )
    say(str(report))
    say(f"converted: {out}")


def compose(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    llm: Annotated[str, typer.Option(help="Language model: folder or hub id.")],
    vision: Annotated[str, typer.Option(help="CLIP vision tower: folder or hub id.")],
    diffusion: Annotated[str, typer.Option(help="Stable Diffusion 1.x or 2.x: folder or hub id.")],
    num_slots: Annotated[int, typer.Option(help="Tokens per image.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default as the language model is saved."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new parts' first weights.")] = 0,
):
    """Build a new, untrained model out of pretrained parts."""
    from mm_interleaved.checkpoint.compose import compose as compose_model

    compose_model(
        out, llm=llm, vision=vision, diffusion=diffusion, num_slots=num_slots, dtype=dtype, seed=seed
    )
    say(f"composed: {out}")


def _output_pixels(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int | None:
    if not unet or not vae:
        return None
    return unet.get("sample_size", 64) * 2 ** (len(vae.get("block_out_channels", (0,))) - 1)


def _size_line(name: str, part: Mapping[str, Any]) -> str:
    size = f"{part['parameters']:>14,} parameters {part['bytes'] / 1e6:>10.1f} MB"
    return f"  {name:<28} {size}  {part['dtypes']}".rstrip()


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
