"""`data`: look at documents, rewrite them, make StoryWorld corpora."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.generate import SOME_FAILED
from mm_interleaved.cli.output import progress, say, say_error
from mm_interleaved.errors import InputError, MMInterleavedError, UsageError


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    data = typer.Typer(help="Look at, convert and make documents.", no_args_is_help=True)
    for name, function in (("check", check), ("convert", convert), ("storyworld", storyworld)):
        command(data, name)(function)
    app.add_typer(data, name="data", rich_help_panel="Data, training, evaluation")


def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".json or .jsonl, in any known format.")
    ],
    image_root: Annotated[
        Path | None, typer.Option(help="Images may lie here and below.", metavar="DIR")
    ] = None,
) -> int:
    """Read documents and open every image; say what is there and what is wrong.

    Every file is looked at. Ends with 3 if one of them is no file of documents or has a wrong field (of each
    file the first is named), else with 7 if an image cannot be opened (each one is named), else with 0.
    """
    from mm_interleaved.document import Image
    from mm_interleaved.document_formats import read_documents

    num_broken = num_wrong = 0
    for path in paths:
        try:
            documents = read_documents(path, image_root=image_root)
        except InputError as error:
            say_error(str(error))
            num_wrong += 1
            continue
        counts: Counter[str] = Counter()
        with progress(len(documents), path.name) as bar:
            for document in documents:
                for part in (*document.parts, *document.target):
                    counts["images" if isinstance(part, Image) else "texts"] += 1
                    if isinstance(part, Image):
                        num_broken += _is_broken(part, document.id)
                bar.advance(document.id)
        say(f"{path}: {len(documents)} documents, {counts['texts']} texts, {counts['images']} images")
    if num_wrong:
        return InputError.exit_code
    return SOME_FAILED if num_broken else 0


def convert(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=".json or .jsonl, in any known format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The canonical .jsonl to write.")],
    image_root: Annotated[
        Path | None, typer.Option(help="Images may lie here and below.", metavar="DIR")
    ] = None,
):
    """Rewrite documents in the canonical form, one a line."""
    from mm_interleaved.document_formats import read_documents, write_documents
    from mm_interleaved.storage import make_folder

    documents = read_documents(source, image_root=image_root)
    make_folder(out.parent)
    write_documents(out, documents)
    say(f"{out}: {len(documents)} documents")


def storyworld(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other documents.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test; they share no picture.")] = "test",
    form: Annotated[
        str, typer.Option("--format", help="jsonl, mmc4, obelics, llava, coco, vqav2, annt, webdataset ...")
    ] = "jsonl",
):
    """Make fresh StoryWorld documents over all tasks."""
    from mm_interleaved.storyworld.exports import EXPORTS, write_storyworld
    from mm_interleaved.storyworld.world import SPLITS

    if form not in EXPORTS:
        raise UsageError(f"--format: found {form!r}, expected one of {', '.join(EXPORTS)}", field="format")
    if split not in SPLITS:
        raise UsageError(f"--split: found {split!r}, expected one of {', '.join(SPLITS)}", field="split")
    path = write_storyworld(out, documents, seed, split, form)
    say(f"{path}: {documents} documents of the {split} split")


def _is_broken(image, document_id: str) -> bool:
    try:
        image.load()
    except MMInterleavedError as error:
        say_error(f"document {document_id!r}: {error}")
        return True
    return False
