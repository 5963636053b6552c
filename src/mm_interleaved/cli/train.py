"""`train` and `export`: a recipe from its settings to a finished model."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.output import say
from mm_interleaved.cli.places import folder_to_write


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (train, export):
        command(app, panel="Data, training, evaluation")(function)


_RECIPE_HELP = (
    "What to train: storyworld, storyworld-boards; pretrain, caption-vqa, grounding, segmentation, "
    "storytelling, instructions or interleaved-instructions, each also with -lora, -storyworld, "
    "-storyworld-lora behind it; or the settings.json of a run."
)


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP)],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder of the run. Default: runs/RECIPE.",
            metavar="DIR",
            callback=folder_to_write,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
):
    """Train a model by a recipe; it can be stopped and resumed at any time.

    On several GPUs or machines: torchrun ... -m mm_interleaved train RECIPE.
    """
    from mm_interleaved.recipes.run import run_recipe

    if not sys.stderr.isatty():
        # No bar is drawn then: lines of the log report how far it is.
        logging.getLogger("mm_interleaved.training.stage_run").setLevel(logging.INFO)
    name = Path(recipe).parent.name if recipe.endswith(".json") else recipe
    folder = run_recipe(
        recipe, assignments or (), resume=resume, out=output or Path("runs", name), show_progress=True
    )
    if os.environ.get("RANK", "0") == "0":
        say(f"the model is in {folder}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
):
    """Write the model of a run's newest checkpoint as a folder that --model takes."""
    from mm_interleaved.recipes.run import export as export_model

    steps = export_model(run, out)
    say(f"the model after {steps} steps (checkpoint step-{steps:08d}) is in {out}")
