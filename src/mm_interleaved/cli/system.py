"""`doctor` and `plan`: what works here, and what would fit."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.models import describe_model
from mm_interleaved.cli.output import say
from mm_interleaved.devices import (
    FORMATS,
    describe,
    describe_threads,
    fast_formats,
    rank_device,
    torch_device,
    training_format,
    weight_format,
)
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.generation.fitting import installed_quantizations
from mm_interleaved.models.cost import BYTES, DEVICES, Needs, needs_of
from mm_interleaved.models.device_memory import room_of
from mm_interleaved.models.memory_plan import MEMORY_CHOICES, MemoryPlan, Room, memory_plans
from mm_interleaved.models.quantization import QUANTIZATIONS
from mm_interleaved.training.plan import GPUS, plan_lines, training_needs
from mm_interleaved.versions import installed_version, requirements, untried

_CORE = ("torch", "transformers", "diffusers", "accelerate", "safetensors", "tokenizers", "pillow", "numpy")
_EXTRAS = {
    "train": ("peft", "pyarrow", "fsspec", "tensorboard"),
    "bench": ("matplotlib",),
    "quantize": ("torchao", "bitsandbytes"),
    "kernels": ("triton",),
    "ray": ("ray",),
}
_GPU_SIZES = (8, 12, 16, 24, 48, 80)
"""Gigabytes of GPUs that people have."""


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (doctor, plan):
        command(app, panel="Models")(function)


def doctor():
    """What works on this machine."""
    say(f"python        {platform.python_version()} on {platform.platform()}")
    tried = {requirement.name: str(requirement.specifier) for requirement in requirements()}
    for package in tried or _CORE:
        bounds = f"  (tried: {tried[package]})" if package in tried else ""
        say(f"{package:<13} {installed_version(package) or 'missing'}{bounds}")
    for sentence in untried():
        say(f"{'untried':<13} {sentence}")
    for line in _device_lines():
        say(line)
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


def _device_lines() -> Iterator[str]:
    """Each device, what is fast on it, and what is chosen by default on the one that is."""
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    gpus += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in (*gpus, torch.device("cpu")):
        fast = [name for name in FORMATS if name in fast_formats(device)]
        slow = [name for name in FORMATS if name not in fast]
        speeds = f"fast in {', '.join(fast)}" + (f"; slow in {', '.join(slow)}" if slow else "")
        yield f"{'device':<13} {device}: {describe(device)}, {speeds}"
    device = torch_device("auto")
    yield f"{'chosen':<13} {device}"
    for saved in FORMATS:
        kept = weight_format(saved, device)
        yield f"{'weights':<13} saved in {saved}: kept in {kept.name}"
    training = training_format(None, rank_device("auto"))
    yield f"{'training':<13} {training.remark or f'in {training.name}'}"
    threads = torch.get_num_threads()
    yield f"{'threads':<13} {threads}: {describe_threads(threads)}"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="storyworld, a folder, a hub id, or `released`: the full-size model.",
        ),
    ] = "storyworld",
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            "--gpus", min=1, max=10**6, help="Also plan its training on so many GPUs; may be repeated."
        ),
    ] = None,
):
    """Memory and time that a model needs, by device and number format: estimated, not measured.

    Memory to generate is that of weights and of a document that fills the context; to train it is that of
    weights, gradients and the optimizer, with activations still on top. Time is counted in multiplications.
    Last comes what `--memory auto` and `low` choose on this machine and on GPUs of usual sizes.
    """
    config, shapes, saved = _numbers_of(model)
    needs = needs_of(config, shapes)
    say(f"{model}: {needs.parameters:,} parameters; context {needs.tokens} tokens, {needs.images} images")
    say()
    say(f"{'memory':<18} {'':<10} {'to generate':>14} {'to train all':>14}")
    for dtype in BYTES:
        generating, training = _size(needs.memory(dtype)), _size(needs.training_memory(dtype))
        say(f"{'':<18} {dtype:<10} {generating:>14} {training:>14}")
    say()
    say(f"{'time, about':<18} {'':<10} {'an image':>14} {'tokens/s':>14}")
    for device in DEVICES:
        for dtype in device.flops:
            seconds = needs.seconds_an_image(device, dtype)
            image = "none" if seconds is None else f"{seconds:.2g} s"
            tokens = needs.tokens_a_second(device, dtype)
            say(f"{device.name:<18} {dtype:<10} {image:>14} {tokens:>14,.0f}")
    say()
    say(f"An image takes {needs.steps} guided steps. Time is right within a factor of a few.")
    say()
    _say_fits(needs, saved)
    if gpus:
        _say_training_plan(config, shapes, needs.tokens, gpus)


def _say_fits(needs: Needs, saved: str):
    """What is chosen here and elsewhere, see `models.memory_plan`."""
    here = room_of(torch_device("auto"))
    say(f"{'to make it fit':<18} {'--memory':<10} chosen")
    for memory in MEMORY_CHOICES:
        plan, *_ = memory_plans(
            needs, here, memory=memory, saved=saved, quantizations=installed_quantizations()
        )
        say(f"{'here':<18} {memory:<10} {_chosen(plan)}")
    for gigabytes in _GPU_SIZES:
        # Few bits count as installed, and the host as large enough for all weights.
        gpu = Room(
            device=f"GPU, {gigabytes} GB",
            device_type="cuda",
            free=gigabytes * 10**9,
            host_free=2 * needs.weight_bytes("bfloat16"),
            fast_formats=frozenset(FORMATS),
        )
        plan, *_ = memory_plans(needs, gpu, memory="auto", saved=saved, quantizations=tuple(QUANTIZATIONS))
        say(f"{gpu.device:<18} {'auto':<10} {_chosen(plan)}")


def _chosen(plan: MemoryPlan) -> str:
    return f"{plan.describe()}: {plan.needs()}" + ("" if plan.fits else "; does not fit")


def _numbers_of(model: str) -> tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]], str]:
    """A model's configuration, the shapes of its tensors, and their number format; no weight is read."""
    if model == "released":
        from mm_interleaved.checkpoint.load import model_shapes
        from mm_interleaved.checkpoint.released_config import RELEASED, released_config

        released = released_config(**RELEASED)
        return json.loads(released.to_json_string(use_diff=False)), model_shapes(released), "bfloat16"
    from mm_interleaved.generation.defaults import generation_defaults
    from mm_interleaved.model_files.config import read_config
    from mm_interleaved.model_files.headers import saved_format, tensor_headers
    from mm_interleaved.model_files.resolve import find_model

    folder = find_model(model)
    config = read_config(folder)
    # How many steps an image takes is one of them.
    generation_defaults(config)
    shapes = {name: header.shape for name, header in tensor_headers(folder).items()}
    return config, shapes, saved_format(folder)


def _say_training_plan(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tokens: int,
    gpus: Sequence[int],
):
    # A row of the released mixture holds at most 30 pairs or 15 images of pages.
    images = min(12, tokens // 64)
    needs = training_needs(config, shapes, tokens=tokens, images=images)
    say()
    say(
        f"Training as the recipe `pretrain` does: {needs.trained / 1e9:.2f} of "
        f"{(needs.frozen + needs.trained) / 1e9:.2f} billion parameters; rows of {tokens} tokens and "
        f"{images} images, {needs.row.training_flops / 1e12:.3g} TFLOP each"
    )
    say()
    say(f"{'GPUs':<18} {'':<14} {'memory a GPU':>14} {'tokens/s':>14}")
    for gpu in GPUS:
        for num_gpus in gpus:
            for line in plan_lines(needs, gpu, num_gpus):
                name = f"{num_gpus} {gpu.name}"
                memory = _size(line.memory) if line.fits else f"{_size(line.memory)}, no"
                say(f"{name:<18} {line.strategy:<14} {memory:>14} {line.tokens_a_second:>14,.0f}")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:.0f} MB"
