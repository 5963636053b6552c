"""`redo`: one part of a finished run made again, the rest kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.options import Output
from mm_interleaved.cli.output import say
from mm_interleaved.cli.report import run_and_report
from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.errors import ModelFileError, UsageError
from mm_interleaved.spelling import counted


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, "redo")(redo)


def redo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")],
    part: Annotated[
        int,
        typer.Option(
            "--part", help="Which part is made again, counted from 0 as in content[2].", metavar="K"
        ),
    ],
    document: Annotated[
        str | None, typer.Option("--document", help="Its id; needed where the run has several.", metavar="ID")
    ] = None,
    output: Output = None,
    rest: Annotated[
        str,
        typer.Option(
            help="The parts after it: keep; again (those that were generated); auto (the model decides)."
        ),
    ] = "keep",
    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if its place has changed.", metavar="MODEL")
    ] = None,
    *,
    flags: Flags,
) -> int:
    """Make one part of a finished run again, and keep the rest.

    Text or image, it is made from what stands before it, with the settings of the run and those given here;
    without --seed, with a seed that was not used yet. Writes a run of its own (default: DIR-redo-N beside
    DIR) with its manifest and page; DIR stays as it is.
    """
    from mm_interleaved.model_files.hashing import hash_model
    from mm_interleaved.model_files.resolve import find_model
    from mm_interleaved.runs.engine import ModelChoice
    from mm_interleaved.runs.generate import RunRequest
    from mm_interleaved.runs.manifest import read_manifest
    from mm_interleaved.runs.redo import Redo, document_named, finished_documents, new_run_folder

    folder = folder.parent if folder.name == "manifest.json" else folder
    manifest = read_manifest(folder / "manifest.json")
    _check_layout(flags)
    documents = finished_documents(folder, manifest)
    chosen = document_named(documents, document, folder)
    _check_part(chosen, part, rest)
    name = model or manifest["model"]["name"]
    if hash_model(find_model(name)) != manifest["model"]["sha256"]:
        raise ModelFileError(f"model {name!r}: its files are not those of the run (SHA-256 differs)")
    target, attempt = (output, 1) if output is not None else new_run_folder(folder)
    if os.path.abspath(target) == os.path.abspath(folder):
        raise UsageError(f"{target}: is the run itself, expected another folder for the new one")
    all_flags = {**manifest["flags"], **flags, "seed": _seed(manifest, flags, attempt)}
    request = RunRequest(
        documents=documents,
        output=target,
        model=ModelChoice.of_manifest(manifest, name),
        flags=all_flags,
        redo=Redo(document=chosen.id, part=part, rest=rest),
        batch_size=1,
    )
    code = run_and_report(request, is_quiet=True)
    return code or _report(target, chosen, part, all_flags)


def _check_layout(flags: Flags):
    if "layout" in flags:
        raise UsageError(
            f"layout: found {flags['layout']!r}, but a part that is made again keeps its kind; --rest auto "
            "lets the model decide how to go on",
            field="layout",
        )


def _check_part(document: Document, part: int, rest: str):
    from mm_interleaved.generation.redo import check_redo

    try:
        check_redo(document, part, rest)
    except UsageError as error:
        if error.field != "part":
            raise
        kinds = " ".join("T" if isinstance(each, Text) else "I" for each in document.parts)
        raise UsageError(f"{error} (its parts: {kinds})", field="part") from error


def _seed(manifest: dict[str, Any], flags: Flags, attempt: int) -> int:
    from mm_interleaved.generation.redo import another_seed

    return flags["seed"] if "seed" in flags else another_seed(manifest["settings"].get("seed", 0), attempt)


def _report(target: Path, before: Document, part: int, flags: Flags) -> int:
    """Says what was made; a text that came out as it was is said to."""
    from mm_interleaved.runs.manifest import read_manifest
    from mm_interleaved.runs.redo import document_named, finished_documents

    found = finished_documents(target, read_manifest(target / "manifest.json"))
    after = document_named(found, before.id, target)
    again = [number for number in range(part, len(after.parts)) if _differs(before, after, number)]
    kind = "text" if isinstance(before.parts[part], Text) else "image"
    what = f"the {kind} of part {part} came out as it was"
    if part in again:
        others = counted(len(again) - 1, "later part") if len(again) > 1 else ""
        what = f"part {part}, {kind}, made again{f', and {others}' if others else ''}"
    say(f"{what} (seed {flags['seed']}): {target / 'index.html'}")
    if part not in again and kind == "text":
        say("text is the likeliest one, whatever the seed; --do-sample lets the seed count")
    return 0


def _differs(before: Document, after: Document, number: int) -> bool:
    old: Part | None = before.parts[number] if number < len(before.parts) else None
    new = after.parts[number]
    if isinstance(old, Text) and isinstance(new, Text):
        return old.text != new.text
    return isinstance(old, Text) or isinstance(new, Text) or old is None or old.encoded() != new.encoded()
