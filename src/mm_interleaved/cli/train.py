"""`train`: a recipe from its settings to a finished model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.output import say


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    command(app, panel="Data, training, evaluation")(train)


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="What to train: storyworld.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the run. Default: runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
):
    """Train a model by a recipe, in stages that can be stopped and resumed at any time."""
    from mm_interleaved.training.run import run_recipe

    folder = run_recipe(
        recipe, assignments or (), resume=resume, out=out or Path("runs", recipe), show_progress=True
    )
    say(f"the model is in {folder}")
