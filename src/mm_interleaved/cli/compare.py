"""`compare`: several evaluations side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.output import progress, say
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.errors import UsageError, escape


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Data, training, evaluation")(compare)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN...", help="Folders that `evaluate` wrote; all others against the first."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the page.", metavar="DIR", callback=folder_to_write),
    ],
    data: Annotated[
        Path | None, typer.Option(help="The task's documents, where they have moved.", metavar="DIR")
    ] = None,
    rescore: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Score so many resamples anew, for intervals of scores that are no means (CIDEr, F1, FID).",
        ),
    ] = 0,
):
    """Compare evaluations of the same documents: comparison.html, comparison.json."""
    folders = named_folders(runs)
    from mm_interleaved.evaluation.comparison import compare as compare_runs
    from mm_interleaved.evaluation.comparison import comparison_record
    from mm_interleaved.evaluation.pages.comparison import comparison_page
    from mm_interleaved.files import make_folder, write_file

    with progress(None, "reading the evaluations") as bar:
        found = compare_runs(folders, data, rescored=rescore, on_done=bar.advance)
    make_folder(output)
    record = json.dumps(comparison_record(found), indent=2, ensure_ascii=False) + "\n"
    write_file(output / "comparison.json", record.encode("utf-8", "backslashreplace"))
    write_file(output / "comparison.html", comparison_page(found))
    names = [run.name for run in found.runs]
    width = max(len(row.metric) for row in found.rows)
    say(f"{'':<{width}} {' '.join(f'{name[:12]:>12}' for name in names)}")
    for row in found.rows:
        values = " ".join(f"{'' if value is None else f'{value:.4f}':>12}" for value in row.values)
        say(f"{row.metric:<{width}} {values}")
    say(f"page: {output / 'comparison.html'}")


def named_folders(runs: Sequence[str]) -> dict[str, Path]:
    """Folders by the names under which they are compared: given before `=`, else their own.

    Raises:
        UsageError: two have the same name.
    """
    folders: dict[str, Path] = {}
    for text in runs:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = Path(text).resolve().name, text
        if not name or not place:
            raise UsageError(f"found {escape(text)!r}, expected a folder or NAME=FOLDER")
        if name in folders:
            raise UsageError(
                f"two runs are called {escape(name)!r} ({escape(str(folders[name]))}, {escape(place)}); name "
                "them: NAME=FOLDER"
            )
        folders[name] = Path(place)
    return folders
