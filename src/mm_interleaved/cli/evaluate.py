"""`evaluate`: how good a model's documents are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.generate import SOME_FAILED, BatchSize, Device, Dtype, Model, NewRun, event_words
from mm_interleaved.cli.output import progress, say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.documents.document import Document
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.events import Event
from mm_interleaved.spelling import hint, unknown_name

TASK_NAMES = ("storyworld",)
"""Kept here too, so that the help does not import what scores."""
PREDICTOR_NAMES = ("constant", "text-only", "nearest", "copy")
"""Of `storyworld.baselines`."""


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Data, training, evaluation")(evaluate)


def evaluate(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help=f"Out of: {', '.join(TASK_NAMES)}.")],
    data: Annotated[Path, typer.Option(help="Folder of the task's documents.", metavar="DIR")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the results.", metavar="DIR", callback=folder_to_write
        ),
    ],
    predictions: Annotated[
        Path | None, typer.Option(help="Score these answers; no model runs.", metavar="FILE")
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            help=f"Score a trivial answer instead of a model's: {', '.join(PREDICTOR_NAMES)}.", metavar="NAME"
        ),
    ] = None,
    model: Model = "storyworld",
    new_run: NewRun = False,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Answer a task's documents and score the answers: predictions.jsonl, scores.json, report.html."""
    for task in tasks:
        if task not in TASK_NAMES:
            raise UsageError(unknown_name("task", task, TASK_NAMES))
    if predictor is not None and predictor not in PREDICTOR_NAMES:
        raise UsageError(f"--predictor: found {escape(predictor)!r}, {hint(predictor, PREDICTOR_NAMES)}")
    if predictor is not None and predictions is not None:
        raise UsageError("give either --predictor or --predictions, found both")
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.evaluation.registry import TASKS
    from mm_interleaved.evaluation.runner import evaluate_model, evaluate_predictions
    from mm_interleaved.runs.generate import ModelChoice, RunRequest

    num_failed = 0
    for name in tasks:
        out = output if len(tasks) == 1 else output / name
        task = TASKS[name]
        if predictor is not None:
            from mm_interleaved.storyworld.baselines import write_predictions

            answers = write_predictions(predictor, task.read_gold(data), out)
            scores = evaluate_predictions(task, data, answers, out)
        elif predictions is not None:
            scores = evaluate_predictions(task, data, predictions, out)
        else:
            chosen = ModelChoice(name=model, device=device, dtype=dtype)
            request = RunRequest(
                documents=(),
                output=out,
                model=chosen,
                flags=flags,
                new_run=new_run,
                batch_size=batch_size,
            )
            with progress(len(task.read_gold(data)), "reading the model") as bar:

                def on_event(document: Document, event: Event | str, bar=bar):
                    if event == "failed":
                        say_error(f"document {document.id!r} failed; it counts as wrong")
                    if event in ("finished", "failed"):
                        bar.advance("")
                    else:
                        bar.tell(f"{document.id}: {event_words(event)}")

                scores, failed = evaluate_model(task, data, request, on_event, load=load_quietly)
                num_failed += failed
        for metric, value in scores.items():
            say(f"{metric:<24} {value:.4f}")
        say(f"report: {out / 'report.html'}")
    return SOME_FAILED if num_failed else 0
