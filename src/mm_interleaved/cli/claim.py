"""What stands behind the claims of the docs, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.generate import Device, Dtype, Model
from mm_interleaved.cli.output import say

_PANEL = "Claims"


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (sight,):
        command(app, panel=_PANEL)(function)


def sight(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.", metavar="DIR")],
    story: Annotated[int, typer.Option(help="Which story of StoryWorld's test split.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the stories.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Show where the model looks in earlier pictures while it names a badge, and while it paints it."""
    from mm_interleaved.evaluation.sight_page import show_sight
    from mm_interleaved.model_source import find_model, load_generator

    numbers = show_sight(load_generator(find_model(model), device=device, dtype=dtype), seed, story, output)
    word = numbers["word"]
    say(f"{word['question']} {word['answer']} (truth: {word['truth']})")
    for name in ("word", "badge"):
        for number, image in enumerate(numbers[name]["images"], start=1):
            told = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in image.items())
            say(f"{name}, image {number}: {told}")
    say(f"pictures: {output / 'word.png'}, {output / 'badge.png'}")
