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
from mm_interleaved.cli.estimate import BYTES, DEVICES, needs_of
from mm_interleaved.cli.models import describe_model
from mm_interleaved.cli.output import say
from mm_interleaved.errors import MMInterleavedError

_CORE = ("torch", "transformers", "diffusers", "accelerate", "safetensors", "tokenizers", "pillow", "numpy")
_EXTRAS = {
    "train": ("peft", "pyarrow", "fsspec", "tensorboard"),
    "eval": ("pycocoevalcap", "torchmetrics"),
    "serve": ("fastapi", "uvicorn"),
    "studio": ("gradio",),
    "ray": ("ray",),
}


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
    """Memory and time that a model needs, by device and number format: estimated, not measured.

    Memory to generate is that of weights and of a document that fills the context; to train it is that of
    weights, gradients and the optimizer, with activations still on top. Time is counted in multiplications.
    """
    from mm_interleaved.checkpoint.headers import tensor_headers
    from mm_interleaved.model_source import find_model, read_config

    folder = find_model(model)
    headers = tensor_headers(folder)
    needs = needs_of(read_config(folder), {name: header.shape for name, header in headers.items()})
    say(f"{model}: {needs.parameters:,} parameters; context {needs.tokens} tokens, {needs.images} images")
    say()
    say(f"{'memory':<18} {'':<10} {'to generate':>14} {'to train all':>14}")
    for dtype in BYTES:
        generating, training = _size(needs.memory(dtype)), _size(needs.training_memory(dtype))
        say(f"{'':<18} {dtype:<10} {generating:>14} {training:>14}")
    say()
    say(f"{'time, about':<18} {'':<10} {'a picture':>14} {'tokens/s':>14}")
    for device in DEVICES:
        for dtype in device.flops:
            seconds = needs.seconds_a_picture(device, dtype)
            picture = "none" if seconds is None else f"{seconds:.2g} s"
            words = needs.words_a_second(device, dtype)
            say(f"{device.name:<18} {dtype:<10} {picture:>14} {words:>14,.0f}")
    say()
    say(f"A picture takes {needs.steps} guided steps. Time is right within a factor of a few.")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:.0f} MB"
