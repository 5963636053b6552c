"""`evaluate`: how good a model's documents are."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.options import BatchSize, Device, Dtype, Model, NewRun
from mm_interleaved.cli.output import progress, say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.cli.report import SOME_FAILED, show_events
from mm_interleaved.documents.document import Document
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.evaluation.names import TASK_NAMES
from mm_interleaved.generation.events import Event
from mm_interleaved.spelling import hint, unknown_name

if TYPE_CHECKING:
    from mm_interleaved.evaluation.shots import Shots
    from mm_interleaved.runs.generate import RunRequest
    from mm_interleaved.runs.ranks import Ranks

JUDGE_KEY = "MM_INTERLEAVED_JUDGE_KEY"
"""Environment variable with the judge's API key, which is written nowhere."""
PREDICTOR_NAMES = ("constant", "text-only", "nearest", "copy")
"""Of `storyworld.baselines`."""
SECONDS_OF_WAITING = 7 * 24 * 3600.0
"""For the slowest rank; of one that ended, the others hear at once."""


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Data, training, evaluation")(evaluate)


Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help=f"Out of: {', '.join(TASK_NAMES)}.")]
Data = Annotated[Path, typer.Option(help="Folder of the task's documents.", metavar="DIR")]
OutputFolder = Annotated[
    Path,
    typer.Option("-o", "--output", help="Folder for the results.", metavar="DIR", callback=folder_to_write),
]
Predictions = Annotated[Path | None, typer.Option(help="Score these answers; no model runs.", metavar="FILE")]
Predictor = Annotated[
    str | None,
    typer.Option(
        help=f"Score a trivial answer instead of a model's: {', '.join(PREDICTOR_NAMES)}.", metavar="NAME"
    ),
]
TaskPrompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", help="Another prompt than the published one: caption, question, ...", metavar="NAME"
    ),
]
SourceSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the data's format, e.g. images=DIR."),
]
Inception = Annotated[
    Path | None, typer.Option(help="TorchScript weights of Inception: FID and KID.", metavar="FILE")
]
Clip = Annotated[
    str | None, typer.Option(help="A CLIP, folder or hub id: agreement of texts and images.", metavar="MODEL")
]
Segmentation = Annotated[
    str | None,
    typer.Option(
        "--segmenter", help="A semantic segmentation, folder or hub id: mean IoU (ade20k).", metavar="MODEL"
    ),
]
NumShots = Annotated[
    int | None,
    typer.Option("--shots", min=1, help="Ask each document after this many examples.", metavar="N"),
]
ShotsFrom = Annotated[
    Path | None, typer.Option(help="The examples' data, in the task's format.", metavar="DIR")
]
ShotChoice = Annotated[
    str,
    typer.Option(help="Examples: random (by --seed), or nearest (by --clip, else by the model's own eyes)."),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="Judge interleaved answers by a model behind this URL (.../v1).", metavar="URL"),
]
JudgeModel = Annotated[
    str | None, typer.Option(help="The judge's name there; without a URL, a local folder.", metavar="NAME")
]


def evaluate(
    tasks: Tasks,
    data: Data,
    output: OutputFolder,
    predictions: Predictions = None,
    predictor: Predictor = None,
    prompt: TaskPrompt = None,
    settings: SourceSettings = None,
    inception: Inception = None,
    clip: Clip = None,
    segmenter: Segmentation = None,
    shots: NumShots = None,
    shots_from: ShotsFrom = None,
    shot_choice: ShotChoice = "random",
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    model: Model = "storyworld",
    new_run: NewRun = False,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Answer a task's documents and score the answers: predictions.jsonl, scores.json, report.html.

    Several processes share the documents: torchrun --nproc-per-node 2 -m mm_interleaved evaluate TASK ...
    """
    _check_names(tasks, predictions, predictor)
    needs_model = predictions is None and predictor is None
    is_first = os.environ.get("RANK", "0") == "0"
    if not (needs_model or is_first):
        return 0
    from mm_interleaved.evaluation.registry import make_task
    from mm_interleaved.evaluation.task import TaskOptions
    from mm_interleaved.evaluation.tasks.interleaved import judge_named
    from mm_interleaved.runs.engine import ModelChoice
    from mm_interleaved.runs.generate import RunRequest

    options = TaskOptions(
        compat=flags.get("compat"),
        prompt=prompt,
        inception=inception,
        clip=clip,
        segmenter=segmenter,
        judge=judge_named(judge_url, judge_model, os.environ.get(JUDGE_KEY, "")),
        source=_source_settings(settings or ()),
    )

    examples = _shots(shots, shots_from, shot_choice, flags.get("seed", 0))
    if examples is not None and not needs_model:
        raise UsageError("--shots: no model is asked with --predictions or --predictor")
    num_failed = 0
    with _ranks(device) if needs_model else nullcontext() as ranks:
        for name in tasks:
            out = output if len(tasks) == 1 else output / name
            task = make_task(name, replace(options, judge_memory=out / "verdicts.jsonl"))
            if predictor is not None or predictions is not None:
                scores = _scores_without_model(task, data, out, predictions, predictor)
            else:
                request = RunRequest(
                    documents=(),
                    output=out,
                    model=ModelChoice(name=model, device=device, dtype=dtype),
                    flags=flags,
                    new_run=new_run,
                    batch_size=batch_size,
                )
                scores, failed = _scores_of_model(task, data, request, ranks, examples)
                num_failed += failed
            if not is_first:
                continue
            for metric, value in scores.items():
                say(f"{metric:<24} {value:.4f}")
            say(f"report: {out / 'report.html'}")
    return SOME_FAILED if num_failed else 0


def _check_names(tasks: list[str], predictions: Path | None, predictor: str | None):
    for task in tasks:
        if task not in TASK_NAMES:
            raise UsageError(unknown_name("task", task, TASK_NAMES))
    if predictor is not None and predictor not in PREDICTOR_NAMES:
        raise UsageError(f"--predictor: found {escape(predictor)!r}, {hint(predictor, PREDICTOR_NAMES)}")
    if predictor is not None and predictions is not None:
        raise UsageError("give either --predictor or --predictions, found both")


def _shots(count: int | None, source: Path | None, choice: str, seed: int) -> Shots | None:
    from mm_interleaved.evaluation.shots import CHOICES, Shots

    if choice not in CHOICES:
        raise UsageError(f"--shot-choice: found {escape(choice)!r}, {hint(choice, CHOICES)}")
    if (count is None) != (source is None):
        raise UsageError("give --shots and --shots-from together, found only one of them")
    if count is None or source is None:
        return None
    return Shots(count=count, source=source, choice=choice, seed=seed)


def _source_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE`, a value in JSON or a string, as settings of a source."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise UsageError(f"--set: found {escape(assignment)!r}, expected KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _scores_without_model(
    task: Any, data: Path, output: Path, predictions: Path | None, predictor: str | None
) -> dict[str, float]:
    """Scores of answers in a file, or of those of a trivial predictor, which are written first."""
    from mm_interleaved.evaluation.runner import evaluate_predictions

    if predictor is not None:
        from mm_interleaved.storyworld.baselines import write_predictions

        predictions = write_predictions(predictor, task.read_gold(data), output)
    assert predictions is not None, "one of the two is given"
    return evaluate_predictions(task, data, predictions, output)


@contextmanager
def _ranks(device: str) -> Generator[Ranks | None, None, None]:
    """The processes that torchrun started; None where this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from mm_interleaved.runs.ranks import joined_ranks

    with joined_ranks(SECONDS_OF_WAITING, device) as ranks:
        if not ranks.is_first:
            # What is wrong with the data is said once.
            logging.getLogger("mm_interleaved").setLevel(logging.ERROR)
        yield ranks


def _scores_of_model(
    task: Any, data: Path, request: RunRequest, ranks: Ranks | None, shots: Shots | None
) -> tuple[dict[str, float], int]:
    """Scores of a model's answers, and how many documents failed."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.evaluation.runner import evaluate_model

    size = 1 if ranks is None else ranks.size
    with progress(-(-len(task.read_gold(data)) // size), "reading the model") as bar:
        show = show_events(bar)

        def on_event(document: Document, event: Event | str):
            if event == "failed":
                say_error(f"document {document.id!r} failed; it counts as wrong")
            show(document, event)

        return evaluate_model(task, data, request, on_event, load=load_quietly, ranks=ranks, shots=shots)
