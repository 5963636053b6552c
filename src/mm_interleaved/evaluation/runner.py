"""Task x model -> predictions.jsonl -> scores.json -> report: answers, then a pure function of them.

OUT/run/               the run folder of the generation, as `generate` writes it
OUT/predictions.jsonl  see `predictions`
OUT/scores.json        flat: "<task>.<metric>" -> number
OUT/evaluation.json    what the numbers were made with: task, options, settings, data by hash, seconds, run
OUT/answers/           where the benchmark has an evaluator of its own: the files that it reads
OUT/confusion.json     where the truth of each attribute is known: what was read in place of what
OUT/gallery.json       the best, median and worst documents
OUT/report.html        all of these, and the documents with the answers
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.predictions import prediction_of, read_predictions
from mm_interleaved.evaluation.report import hash_documents, write_record, write_report
from mm_interleaved.evaluation.task import Task
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.runs.generate import OnEvent, RunRequest, run_documents

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

logger = logging.getLogger(__name__)


def evaluate_model(
    task: Task,
    data: Path,
    request: RunRequest,
    on_event: OnEvent,
    *,
    load: Callable[..., InterleavedGenerator] | None = None,
) -> tuple[dict[str, float], int]:
    """Let a model answer every document of a task, and score it: the scores, and how many documents failed.

    Documents with `candidates` in their meta get a ranking of them too.

    Args:
        request: its `documents` are replaced by the task's; its `output` is OUT above.
        load: see `run_documents`; default: `load_generator`.
    """
    begun = time.monotonic()
    # The run and the ranking ask for the same model; it is read once.
    load = cache(load or load_generator)
    out = request.output
    gold = task.read_gold(data)
    digest = hash_documents(gold)
    make_folder(out)
    request = replace(request, flags={**task.settings, **request.flags})
    # The model must not see the gold answers, and the run must not depend on them.
    questions = [replace(document, target=()) for document in gold]
    outcome = run_documents(replace(request, documents=questions, output=out / "run"), on_event, load=load)
    predictions = [prediction_of(record) for record in outcome.records]
    asked = {document.id: document for document in questions if "candidates" in document.meta}
    for prediction in predictions:
        if prediction["id"] in asked and "error" not in prediction:
            model = request.model
            # Named as `run_documents` names them: it is the model that has just answered, not a second one.
            generator = load(
                find_model(model.name),
                device=model.device,
                dtype=model.dtype,
                acceleration=model.acceleration,
            )
            prediction["meta"] = {"ranking": _ranking(generator, asked[prediction["id"]])}
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    write_file(out / "predictions.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
    answers = read_predictions(out / "predictions.jsonl", gold)
    scores = task.score(answers, gold)
    errors = {record["id"]: record["error"]["message"] for record in outcome.records if "error" in record}
    write_report(out, task, scores, answers, gold, errors=errors)
    write_record(out, task, data, gold, digest, flags=request.flags, seconds=time.monotonic() - begun)
    if task.export is not None:
        task.export(answers, gold, out / "answers")
    return scores, outcome.num_failed


def evaluate_predictions(task: Task, data: Path, predictions: Path, out: Path) -> dict[str, float]:
    """Score answers that are there already; writes scores.json and report.html into `out`."""
    gold = task.read_gold(data)
    answers = read_predictions(predictions, gold)
    scores = task.score(answers, gold)
    write_report(out, task, scores, answers, gold)
    file = None if predictions.absolute() == (out / "predictions.jsonl").absolute() else predictions
    write_record(out, task, data, gold, hash_documents(gold), predictions=file)
    if task.export is not None:
        task.export(answers, gold, out / "answers")
    return scores


def _ranking(generator: InterleavedGenerator, document: Document) -> list[int]:
    """The ranking; an empty one, which counts as wrong, where a candidate does not fit the model."""
    try:
        return rank_candidates(generator, document)
    except InputError as error:
        logger.warning(
            "document %r: its candidates are not ranked (%s); it counts as wrong", document.id, error
        )
        return []


def rank_candidates(generator: InterleavedGenerator, document: Document) -> list[int]:
    """Indices of a document's candidate answers, from the likeliest to the least likely."""
    scores = generator.score_options(document, document.meta["candidates"])
    return sorted(range(len(scores)), key=lambda index: -scores[index])
