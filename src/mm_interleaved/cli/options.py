"""Options that several commands have in common, each with its help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.models.memory_plan import MEMORY_CHOICES
from mm_interleaved.spelling import hint

Model = Annotated[
    str, typer.Option("--model", help="storyworld (shipped), a folder, or a hub id.", metavar="MODEL")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Folder for the results. Default: out/NAME-HASH.",
        metavar="DIR",
        callback=folder_to_write,
    ),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text part; parts keep the order typed.")]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="An image part; parts keep the order typed.")
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(help="Images may lie here and below (default: INPUT's folder).", metavar="DIR"),
]
SkipMissingImages = Annotated[
    bool, typer.Option("--skip-missing-images", help="Leave out images whose files are absent.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Documents continued at once (default: by device; as the run in DIR began).",
    ),
]
NewRun = Annotated[bool, typer.Option("--new-run", help="Move an earlier run in DIR aside and begin anew.")]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Make the documents that failed again.")]

EngineName = Annotated[
    str,
    typer.Option(
        "--engine", help="single: this process; ray: actors on a Ray cluster, started here or at --address."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: a running cluster, HOST:PORT, or auto for the one of this machine.",
        metavar="ADDRESS",
    ),
]
NumActors = Annotated[
    int | None,
    typer.Option(min=1, help="With --engine ray: copies of the model (default: as the cluster has room)."),
]
GpusPerActor = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="With --engine ray: GPUs, or the part of one, of each copy (default: 1, or 0 without any).",
    ),
]

ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="Keep the image decoder's feature maps channels last.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the image decoder: a minute more, then faster.")
]
Quantization = Annotated[
    str | None, typer.Option(help="Not exact: weights of the language model in few bits: int8 or nf4.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Make the model fit: auto chooses number format, few bits and what waits outside of the "
        "device; low takes as little as can be (default: as it is)."
    ),
]
AdapterFolder = Annotated[
    Path | None,
    typer.Option(help="Not exact: LoRA weights for the image decoder, such as an LCM-LoRA.", metavar="DIR"),
]


def checked_memory(memory: str | None) -> str | None:
    """A way of making the model fit. Raises UsageError for one that is not there."""
    if memory is not None and memory not in MEMORY_CHOICES:
        raise UsageError(f"memory: found {escape(memory)!r}, {hint(memory, MEMORY_CHOICES)}", field="memory")
    return memory
