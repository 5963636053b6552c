"""`generate` and `replay`: the main job, and the same again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command, typed_in_order
from mm_interleaved.cli.output import progress, say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.documents.document import Document, Image, Part, Text, part_records
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.documents.strict_json import STANDARD_INPUT
from mm_interleaved.errors import InputError, ModelFileError, SomeFailedError, UsageError
from mm_interleaved.generation.events import Event, ImagePreview, ImageStarted, TextDelta
from mm_interleaved.generation.loading import AS_IT_IS, Acceleration
from mm_interleaved.generation.settings import GenerationSettings

SOME_FAILED = SomeFailedError.exit_code

Model = Annotated[
    str, typer.Option("--model", help="storyworld (shipped), a folder, or a hub id.", metavar="MODEL")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Folder for the results. Default: out/NAME-HASH.",
        metavar="DIR",
        callback=folder_to_write,
    ),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text part; parts keep the order typed.")]
Pictures = Annotated[
    list[Path] | None, typer.Option("--image", help="An image part; parts keep the order typed.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Documents continued at once (default: by device; as the run in DIR began).",
    ),
]
NewRun = Annotated[bool, typer.Option("--new-run", help="Move an earlier run in DIR aside and begin anew.")]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Make the documents that failed again.")]


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    command(app, "generate")(generate)
    command(app, "replay")(replay)


def generate(
    context: typer.Context,
    input: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT", help="Documents: .json or .jsonl (or .gz), in any known format; - is piped in."
        ),
    ] = None,
    output: Output = None,
    model: Model = "storyworld",
    text: Texts = None,
    image: Pictures = None,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Images may lie here and below (default: INPUT's folder).", metavar="DIR"),
    ] = None,
    skip_missing_images: Annotated[
        bool, typer.Option("--skip-missing-images", help="Leave out images whose files are absent.")
    ] = False,
    retry_errors: RetryErrors = False,
    new_run: NewRun = False,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Keep the painter's maps channels last.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the painter: a minute more, then faster.")
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option(help="Not exact: weights of the language model in few bits: int8 or nf4."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Low-rank additions to draw with, such as an LCM-LoRA. Not exact.", metavar="DIR"),
    ] = None,
    *,
    flags: Flags,
) -> int:
    """Continue documents: texts and images in, longer texts and images out.

    Either INPUT holds the documents, or --text and --image give one, part by part. Writes results.jsonl,
    images/, index.html and manifest.json into DIR. The same command again finishes what is missing.
    """
    parts = typed_parts(context, text, image)
    if (input is None) == (not parts):
        found = "both" if parts else "neither"
        raise UsageError(f"expected either INPUT or --text/--image parts, found {found}")
    documents = (
        read_documents(input, image_root=image_root, skip_missing_images=skip_missing_images)
        if input
        else [typed_document("story", parts)]
    )
    if input and output and output.resolve() in (input.resolve(), input.resolve().parent / "results.jsonl"):
        raise UsageError(f"{output}: is the input, expected another folder for the results")
    name = "stdin" if str(input) == STANDARD_INPUT else input.stem if input else "story"
    output = output or default_output(name, documents, model, flags)
    return run_and_report(
        documents,
        output,
        model,
        device,
        dtype,
        flags,
        new_run=new_run,
        retry_errors=retry_errors,
        batch_size=batch_size,
        acceleration=Acceleration(
            channels_last=channels_last, compile=compile, adapter=adapter, quantization=quantization
        ),
    )


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
    from mm_interleaved.model_files.hashing import hash_model
    from mm_interleaved.model_files.resolve import find_model
    from mm_interleaved.runs.folder import changed_files, check_input
    from mm_interleaved.runs.generate import facts_that_differ
    from mm_interleaved.runs.manifest import batch_size_of, read_manifest

    manifest = manifest / "manifest.json" if manifest.is_dir() else manifest
    wanted = read_manifest(manifest)
    if "outputs" not in wanted:
        raise InputError(
            f"{manifest}: tells of no outputs; the run is not finished, run its command again first"
        )
    _check_flags(manifest, wanted["flags"])
    name = model or wanted["model"]["name"]
    if hash_model(find_model(name)) != wanted["model"]["sha256"]:
        raise ModelFileError(f"model {name!r}: its files are not those of the run (SHA-256 differs)")
    documents = read_documents(manifest.parent / "input" / "documents.jsonl")
    check_input(manifest.parent, wanted, documents)
    changed = changed_files(manifest.parent, wanted)
    _use_threads(wanted["threads"])
    with tempfile.TemporaryDirectory(prefix="mm-interleaved-replay-") as temporary:
        folder = output or Path(temporary) / "run"
        run_and_report(
            documents,
            folder,
            name,
            wanted["device"],
            wanted["dtype"],
            wanted["flags"],
            is_quiet=True,
            batch_size=batch_size_of(wanted),
            acceleration=Acceleration.of_record(wanted.get("acceleration", {})),
        )
        found = read_manifest(folder / "manifest.json")
    for difference in facts_that_differ(wanted, found):
        say_error(f"{difference}: the same bits are not promised")
    return _report_replay(wanted["outputs"], found["outputs"], changed)


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


def run_and_report(
    documents: Sequence[Document],
    output: Path,
    model: str,
    device: str,
    dtype: str,
    flags: Flags,
    *,
    new_run: bool = False,
    retry_errors: bool = False,
    batch_size: int | None = None,
    is_quiet: bool = False,
    acceleration: Acceleration = AS_IT_IS,
) -> int:
    """Run documents with a progress bar, say what was written; the exit code."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.runs.generate import ModelChoice, RunRequest, run_documents

    request = RunRequest(
        documents=documents,
        output=output,
        model=ModelChoice(name=model, device=device, dtype=dtype, acceleration=acceleration),
        flags=flags,
        new_run=new_run,
        retry_errors=retry_errors,
        batch_size=batch_size,
    )
    with progress(len(documents), "reading the model") as bar:

        def on_event(document: Document, event: Event | str):
            if event in ("finished", "failed"):
                bar.advance("")
            else:
                bar.tell(f"{document.id}: {event_words(event)}")

        outcome = run_documents(request, on_event, load=load_quietly)
    if is_quiet:
        return 0
    say(_summary(outcome))
    failed = [record for record in outcome.records if "error" in record]
    if failed:
        first = failed[0]
        say_error(
            f"{len(failed)} of {outcome.num_documents} documents failed, the first is {first['id']!r}: "
            f"{first['error']['message']}"
        )
        return SOME_FAILED
    return 0


def event_words(event: Event | str) -> str:
    """What an event says in a progress bar."""
    match event:
        case TextDelta():
            return "writing"
        case ImageStarted(index=index):
            return f"drawing picture {index + 1}"
        case ImagePreview(step=step):
            return f"drawing, step {step}"
    return ""


def _summary(outcome: Any) -> str:
    page = outcome.output / "index.html"
    if not outcome.made:
        finished = _counted(outcome.num_already_finished, "document")
        return f"nothing was left to do, {finished} finished before: {page}"
    parts = [part for record in outcome.made for part in part_records(record)]
    drawn = sum(1 for part in parts if part["type"] == "image" and part.get("generated"))
    documents, pictures = _counted(len(outcome.made), "document"), _counted(drawn, "picture")
    lines = [f"{documents}, {pictures} drawn: {page}"]
    if outcome.num_already_finished:
        lines.append(f"{_counted(outcome.num_already_finished, 'document')} finished before")
    return "\n".join([*lines, *_exactness(parts, outcome.is_lossy)])


def _exactness(parts: Sequence[Any], is_lossy: bool) -> list[str]:
    """What to say of pictures that were drawn by a shorter way."""
    errors = [part["pixel_error"] for part in parts if "pixel_error" in part]
    if errors:
        mean, most = sum(errors) / len(errors), max(errors)
        return [
            f"mean difference from what is drawn with nothing left out: {mean:.2f} of 255 levels, at most "
            f"{most:.2f} in a picture"
        ]
    return ["drawn by a shorter way, not exactly; --report-error tells how far off it is"] if is_lossy else []


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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


def _use_threads(number: int):
    import torch

    torch.set_num_threads(number)


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
