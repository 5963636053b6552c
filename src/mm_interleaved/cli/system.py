"""`doctor` and `plan`: what works here, and what would fit."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.models import describe_model
from mm_interleaved.cli.output import say
from mm_interleaved.errors import MMInterleavedError

_CORE = ("torch", "transformers", "diffusers", "accelerate", "safetensors", "tokenizers", "pillow", "numpy")
_EXTRAS = {
    "train": ("torchdata", "peft", "pyarrow", "fsspec", "tensorboard"),
    "eval": ("pycocoevalcap", "torchmetrics"),
    "serve": ("fastapi", "uvicorn"),
    "studio": ("gradio",),
    "ray": ("ray",),
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (doctor, plan):
        command(app, panel="Models")(function)


def doctor():
    """What works on this machine."""
    import torch

    from mm_interleaved.generation_run import package_version

    say(f"python        {platform.python_version()} on {platform.platform()}")
    for package in _CORE:
        say(f"{package:<13} {package_version(package) or 'missing'}")
    devices = [f"{torch.cuda.get_device_name(k)} (cuda:{k})" for k in range(torch.cuda.device_count())]
    devices += ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    devices.append(f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    say(f"devices       {', '.join(devices)}")
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        state = f"not installed: {', '.join(missing)}" if missing else "installed"
        say(f"{f'[{extra}]':<13} {state}")
    say(f"disk          {shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here")
    try:
        total = describe_model("storyworld")["total"]
        say(f"storyworld    {total['parameters']:,} parameters, {total['bytes'] / 1e6:.0f} MB, files whole")
    except MMInterleavedError as error:
        say(f"storyworld    {error}")


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="storyworld, a folder, or a hub id.")
    ] = "storyworld",
):
    """Memory that a model needs, by number format: an estimate from its parameters alone."""
    description = describe_model(model)
    parameters = description["total"]["parameters"]
    say(f"{description['model']}: {parameters:,} parameters")
    say(f"{'':<10} {'to generate':>14} {'to train all':>14}")
    for name, size in _BYTES.items():
        # In float32: weights, their average, gradients, two moments; beside them the copy computed in.
        training = parameters * (4 * 5 + (size if size < 4 else 0))
        say(f"{name:<10} {_size(parameters * size * 1.2):>14} {_size(training):>14}")
    say("Weights with a fifth on top to generate; activations of training come on top of the second column.")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:.0f} MB"
