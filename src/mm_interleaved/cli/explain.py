"""`explain`: what the model looked at, as a page, overlays and arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape as html_escape
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.options import Device, Dtype, ImageRoot
from mm_interleaved.cli.output import Progress, progress, say
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.documents.session_files import SESSION
from mm_interleaved.files import new_folder, write_file


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, "explain")(explain)


def explain(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A finished run's folder, a session, or documents: .json or .jsonl."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="New folder for the pages.", metavar="DIR", callback=folder_to_write
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="storyworld, a folder, or a hub id (default: the run's).", metavar="MODEL"),
    ] = None,
    image_root: ImageRoot = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    regions: Annotated[int, typer.Option(help="Regions along a side of an image.", min=1, max=64)] = 8,
    grid: Annotated[int, typer.Option(help="Cells along a side of its heat maps.", min=2, max=64)] = 16,
    *,
    flags: Flags,
) -> int:
    """Show where the model looked in earlier images, for each word and each region of a generated image.

    Documents that hold nothing generated are continued first. Writes a page to point at, overlays as PNG,
    and arrays by layer, head and level (arrays.npz, explanation.json) into DIR, which must be new.
    """
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.generation.defaults import defaults_of
    from mm_interleaved.generation.settings import settings_for
    from mm_interleaved.model_files.resolve import find_model
    from mm_interleaved.runs.explanation import write_explanation
    from mm_interleaved.runs.folder import file_stems
    from mm_interleaved.runs.page import title_of

    documents, run = _documents(input, image_root)
    name = model or (run["model"]["name"] if run else "storyworld")
    given = {**(run["flags"] if run else {}), **flags}
    stems = file_stems([document.id for document in documents])
    with new_folder(output) as folder, progress(len(documents), "reading the model") as bar:
        generator = load_quietly(find_model(name), device=device, dtype=dtype)
        for document in documents:
            settings = settings_for(document, defaults_of(generator.model), given)
            if not any(part.generated for part in document.parts):
                bar.show(f"{document.id}: continuing")
                document = generator.generate(document, settings)
            found = generator.explain(
                document, settings, regions=regions, grid=grid, on_part=_shows(bar, document)
            )
            title = title_of([{"id": document.id, "meta": dict(document.meta)}])
            place = folder if len(documents) == 1 else folder / stems[document.id]
            write_explanation(place, found, title, f"what {Path(name).name} looked at")
            bar.advance("")
        if len(documents) > 1:
            write_file(folder / "index.html", _contents(documents, stems))
    say(f"what the model looked at: {output / 'index.html'}")
    return 0


def _documents(input: Path, image_root: Path | None) -> tuple[Sequence[Document], Mapping[str, Any] | None]:
    """The documents, and the manifest of the run that they are of, if they are of one."""
    from mm_interleaved.runs.manifest import read_manifest
    from mm_interleaved.runs.redo import finished_documents

    if os.path.isdir(input) and not (input / "manifest.json").exists() and (input / SESSION).exists():
        input = input / SESSION
    folder = input if os.path.isdir(input) else input.parent
    is_run = input == folder or input.name in ("results.jsonl", "manifest.json")
    if is_run and (folder / "manifest.json").exists():
        manifest = read_manifest(folder / "manifest.json")
        return finished_documents(folder, manifest), manifest
    return read_documents(input, image_root=image_root), None


def _shows(bar: Progress, document: Document):
    return lambda part: bar.show(f"{document.id}: denoising part {part} again")


def _contents(documents: Sequence[Document], stems: Mapping[str, str]) -> bytes:
    items = "".join(
        f'<li><a href="{html_escape(stems[each.id])}/index.html">{html_escape(each.id)}</a></li>'
        for each in documents
    )
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    title = "What the model looked at"
    page = f"<head>{head}<title>{title}</title></head><body><h1>{title}</h1><ul>{items}</ul></body>"
    return f'<!doctype html>\n<html lang="en">{page}</html>\n'.encode()
