"""`generate` and `replay`: the main job, and the same again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command, typed_in_order
from mm_interleaved.cli.options import (
    AdapterFolder,
    Address,
    BatchSize,
    ChannelsLast,
    Compile,
    Device,
    Dtype,
    EngineName,
    GpusPerActor,
    ImageRoot,
    Images,
    Memory,
    Model,
    NewRun,
    NumActors,
    Output,
    Quantization,
    RetryErrors,
    SkipMissingImages,
    Texts,
    checked_memory,
)
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.cli.report import SOME_FAILED, run_and_report
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.documents.record_files import STANDARD_INPUT
from mm_interleaved.errors import InputError, ModelFileError, UsageError, escape
from mm_interleaved.generation.loading import Acceleration
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.spelling import hint

if TYPE_CHECKING:
    from mm_interleaved.runs.engine import Engine

ENGINES = ("single", "ray")


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    command(app, "generate")(generate)
    command(app, "replay")(replay)


def generate(
    context: typer.Context,
    input: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="Documents: .json or .jsonl (or .gz) or .parquet, in any known format; - is piped in.",
        ),
    ] = None,
    output: Output = None,
    model: Model = "storyworld",
    text: Texts = None,
    image: Images = None,
    image_root: ImageRoot = None,
    skip_missing_images: SkipMissingImages = False,
    retry_errors: RetryErrors = False,
    new_run: NewRun = False,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    channels_last: ChannelsLast = False,
    compile: Compile = False,
    quantization: Quantization = None,
    memory: Memory = None,
    adapter: AdapterFolder = None,
    engine: EngineName = "single",
    address: Address = None,
    num_actors: NumActors = None,
    gpus_per_actor: GpusPerActor = None,
    *,
    flags: Flags,
) -> int:
    """Continue documents: texts and images in, longer texts and images out.

    Either INPUT holds the documents, or --text and --image give one, part by part. Writes results.jsonl,
    images/, index.html and manifest.json into DIR. The same command again finishes what is missing.
    """
    from mm_interleaved.runs.engine import ModelChoice
    from mm_interleaved.runs.generate import RunRequest

    continued_by = _engine(engine, address=address, num_actors=num_actors, gpus_per_actor=gpus_per_actor)
    parts = typed_parts(context, text, image)
    documents = _given_documents(input, parts, image_root, skip_missing_images)
    if input and output and output.resolve() in (input.resolve(), input.resolve().parent / "results.jsonl"):
        raise UsageError(f"{output}: is the input, expected another folder for the results")
    name = "stdin" if str(input) == STANDARD_INPUT else input.stem if input else "story"
    acceleration = Acceleration(
        channels_last=channels_last, compile=compile, adapter=adapter, quantization=quantization
    )
    request = RunRequest(
        documents=documents,
        output=output or default_output(name, documents, model, flags),
        model=ModelChoice(
            name=model, device=device, dtype=dtype, acceleration=acceleration, memory=checked_memory(memory)
        ),
        flags=flags,
        new_run=new_run,
        retry_errors=retry_errors,
        batch_size=batch_size,
        engine=continued_by,
    )
    return run_and_report(request)


def _engine(name: str, **settings: Any) -> Engine:
    """What continues the documents. Raises UsageError: no such engine, or settings of another."""
    from mm_interleaved.runs.engine import continue_here
    from mm_interleaved.runs.ray_engine import RayEngine

    if name == "ray":
        return RayEngine(**settings)
    if name != "single":
        raise UsageError(f"engine: found {escape(name)!r}, {hint(name, ENGINES)}", field="engine")
    for setting, value in settings.items():
        if value is not None:
            raise UsageError(
                f"{setting.replace('_', '-')}: found {value} without --engine ray, which it belongs to",
                field=setting,
            )
    return continue_here


def _given_documents(
    input: Path | None, parts: Sequence[Part], image_root: Path | None, skip_missing_images: bool
) -> Sequence[Document]:
    """The documents of INPUT, or the one that was typed. Raises UsageError for both and for neither."""
    if (input is None) == (not parts):
        found = "both" if parts else "neither"
        raise UsageError(f"expected either INPUT or --text/--image parts, found {found}")
    if input is None:
        return [typed_document("story", parts)]
    return read_documents(input, image_root=image_root, skip_missing_images=skip_missing_images)


def replay(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json of a finished run, in its folder.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to keep the second run in.",
            metavar="DIR",
            callback=folder_to_write,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if its place has changed.", metavar="MODEL")
    ] = None,
) -> int:
    """Make a run again and compare: every record and every image, bit for bit.

    What was changed in the folder since the run ended is named too.
    """
    from mm_interleaved.runs.folder import changed_files, check_input
    from mm_interleaved.runs.generate import facts_that_differ
    from mm_interleaved.runs.manifest import read_manifest

    manifest = manifest / "manifest.json" if manifest.is_dir() else manifest
    wanted = read_manifest(manifest)
    if "outputs" not in wanted:
        raise InputError(
            f"{manifest}: names no outputs; the run is not finished, run its command again first"
        )
    if wanted.get("answering"):
        raise UsageError(
            f"{manifest}: made by `evaluate`, which also chose among answers; run that command again, with "
            "another -o"
        )
    _check_flags(manifest, wanted["flags"])
    name = model or wanted["model"]["name"]
    _check_model(name, wanted)
    documents = read_documents(manifest.parent / "input" / "documents.jsonl")
    check_input(manifest.parent, wanted, documents)
    changed = changed_files(manifest.parent, wanted)
    with tempfile.TemporaryDirectory(prefix="mm-interleaved-replay-") as temporary:
        folder = output or Path(temporary) / "run"
        _run_again(wanted, documents, name, folder)
        found = read_manifest(folder / "manifest.json")
    for difference in facts_that_differ(wanted, found):
        say_error(f"{difference}: the same bits are not promised")
    return _report_replay(wanted["outputs"], found["outputs"], changed)


def _run_again(wanted: dict[str, Any], documents: Sequence[Document], model: str, output: Path):
    """The run of a manifest once more, into another folder."""
    import torch

    from mm_interleaved.runs.engine import ModelChoice
    from mm_interleaved.runs.generate import RunRequest
    from mm_interleaved.runs.manifest import batch_size_of
    from mm_interleaved.runs.redo import Redo

    torch.set_num_threads(wanted["threads"])
    request = RunRequest(
        documents=documents,
        output=output,
        model=ModelChoice.of_manifest(wanted, model),
        flags=wanted["flags"],
        redo=None if "redo" not in wanted else Redo.of_record(wanted["redo"]),
        batch_size=batch_size_of(wanted),
    )
    run_and_report(request, is_quiet=True)


def _check_model(name: str, wanted: dict[str, Any]):
    from mm_interleaved.model_files.hashing import hash_model
    from mm_interleaved.model_files.resolve import find_model

    if hash_model(find_model(name)) != wanted["model"]["sha256"]:
        raise ModelFileError(f"model {name!r}: its files are not those of the run (SHA-256 differs)")


def typed_parts(context: typer.Context, text: list[str] | None, image: list[Path] | None) -> list[Part]:
    """The parts given by --text and --image, in the order typed."""
    parts: list[Part] = []
    for name, value in typed_in_order(context, text=text or [], image=image or []):
        if name == "text":
            parts.append(Text(checked_text(value, "--text")))
        else:
            parts.append(Image(checked_file(value), name=str(value)))
    return parts


def typed_document(name: str, parts: Sequence[Part], layout: str | None = None) -> Document:
    """A document made of what was typed."""
    return Document(id=name, parts=tuple(parts), layout=layout, meta={"title": f"A {name}"})


def default_output(name: str, documents: Sequence[Document], model: str, flags: Flags) -> Path:
    """`out/<name>-<hash>`: the same command finds its folder again, another one gets another."""
    described = [model, dict(flags), [repr((document.id, document.parts)) for document in documents]]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return Path("out") / f"{name}-{digest[:6]}"


def _check_flags(manifest: Path, flags: dict[str, Any]):
    try:
        GenerationSettings.combine(flags)
    except UsageError as error:
        raise InputError(f"{manifest}: flags: {error}", field=f"flags.{error.field}") from error


def _report_replay(
    wanted: dict[str, dict[str, str]], found: dict[str, dict[str, str]], changed: Sequence[str]
) -> int:
    same, differing = {}, []
    for kind in ("records", "images"):
        same[kind] = sum(found[kind].get(key) == value for key, value in wanted[kind].items())
        differing += [
            key for key in {**wanted[kind], **found[kind]} if found[kind].get(key) != wanted[kind].get(key)
        ]
    say(
        f"replay: {same['records']} of {len(wanted['records'])} records and "
        f"{same['images']} of {len(wanted['images'])} images are the same, bit for bit"
    )
    if differing:
        say(f"different: {', '.join(differing)}")
    if changed:
        say(f"changed in the folder since the run ended: {', '.join(changed)}")
    return SOME_FAILED if differing or changed else 0


def checked_text(text: str, name: str) -> str:
    """A text as typed. Raises UsageError where it says nothing, InputError where it is no Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text as typed: character {error.start} is not UTF-8", field="text") from error
    if not text.strip():
        raise UsageError(f"{name}: found an empty text, expected words", field=name.lstrip("-").lower())
    return text


def checked_file(path: Path, argument: str = "--image") -> Path:
    # Not Path.is_file, which raises where a name is too long or a folder is closed to us.
    if not os.path.isfile(path):
        found = "is not a regular file" if os.path.exists(path) else "there is no such file"
        raise InputError(f"{argument} {str(path)!r}: {found}", field="image")
    return path
