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
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.evaluation.answering import alike_together
from mm_interleaved.evaluation.extractors import ClipEmbedder
from mm_interleaved.evaluation.predictions import prediction_of, read_predictions
from mm_interleaved.evaluation.readers import GeneratorReader, answers_read
from mm_interleaved.evaluation.records import hash_documents, write_record
from mm_interleaved.evaluation.report import write_report
from mm_interleaved.evaluation.shots import Embed, Shots, choose_examples, with_examples
from mm_interleaved.evaluation.task import Task
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.runs.engine import Answer, ModelChoice, OnEvent
from mm_interleaved.runs.generate import RunRequest, run_documents

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.runs.ranks import Ranks


def evaluate_model(
    task: Task,
    data: Path,
    request: RunRequest,
    on_event: OnEvent,
    *,
    load: Callable[..., InterleavedGenerator] | None = None,
    ranks: Ranks | None = None,
    shots: Shots | None = None,
) -> tuple[dict[str, float], int]:
    """Let a model answer every document of a task, and score it: the scores, and how many documents failed.

    Documents with `candidates` in their meta get a ranking of them too.

    Args:
        request: its `documents` are replaced by the task's; its `output` is OUT above.
        load: see `run_documents`; default: `load_generator`.
        ranks: the processes that answer together, all of which call this. The first one scores and writes;
            the others return no scores, and the number of failed documents of their own.
        shots: examples before each document.
    """
    begun = time.monotonic()
    out = request.output
    gold = task.read_gold(data)

    def check() -> str:
        digest = hash_documents(gold)
        make_folder(out)
        return digest

    # Images are opened once, by one rank.
    digest = check() if ranks is None else ranks.from_first(check)
    load = cache(_with_ranker(load or load_generator, task))
    # The model must not see the gold answers, and the run must not depend on them.
    questions = [replace(document, target=()) for document in gold]
    chosen: dict[str, list[str]] = {}
    if shots is not None:
        pool = task.read_gold(shots.source)
        embed = _embedder(task, request.model, load, ranks) if shots.choice == "nearest" else None
        choose = partial(choose_examples, questions, pool, shots, embed)
        chosen = choose() if ranks is None else ranks.from_first(choose)
        questions = with_examples(questions, pool, chosen)
    questions = alike_together(questions)
    request = replace(
        request,
        documents=questions,
        output=out / "run",
        flags={**task.settings, **request.flags},
        answering=_answering(task, questions),
    )
    answer: Answer = task.ranking.answer
    if task.readers is not None:
        answer = answers_read(answer, task.readers, gold)
    outcome = run_documents(request, on_event, load=load, answer=answer, ranks=ranks)
    if ranks is not None and not ranks.is_first:
        return {}, outcome.num_failed
    records = {record["id"]: record for record in outcome.records}
    in_order = [records[document.id] for document in gold]
    lines = [json.dumps(prediction_of(record), ensure_ascii=False) + "\n" for record in in_order]
    write_file(out / "predictions.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
    answers = read_predictions(out / "predictions.jsonl", gold)
    scores = task.score(answers, gold)
    errors = {record["id"]: record["error"]["message"] for record in outcome.records if "error" in record}
    write_report(out, task, scores, answers, gold, errors=errors)
    seconds = time.monotonic() - begun
    prompt = next(question for question in questions if question.id == gold[0].id)
    few_shot = None if shots is None else {**shots.record(), "examples": chosen}
    write_record(
        out, task, data, gold, digest, flags=request.flags, seconds=seconds, prompt=prompt, shots=few_shot
    )
    if task.export is not None:
        task.export(answers, gold, out / "answers")
    return scores, outcome.num_failed


def _embedder(
    task: Task, model: ModelChoice, load: Callable[..., InterleavedGenerator], ranks: Ranks | None
) -> Embed:
    """What finds the nearest images: a CLIP where one is given, else the model's own image tokens."""
    clip = task.options.clip
    if clip is not None:
        embedder = ClipEmbedder(clip)
        return lambda images: embedder.images([image.load() for image in images])

    device = model.device if ranks is None else str(ranks.device)

    def embed(images: Sequence[Image]) -> np.ndarray:
        # As `run_documents` asks for it: the same model, read once.
        generator = load(
            find_model(model.name), device=device, dtype=model.dtype, acceleration=model.acceleration
        )
        return GeneratorReader(generator).embeddings(images)

    return embed


def _answering(task: Task, questions: Sequence[Document]) -> dict[str, Any]:
    """What makes the answers others than those of documents that are just continued."""
    is_ranked = any("candidates" in document.meta for document in questions)
    found = task.ranking.record() if is_ranked else {}
    if task.image_ranker is not None:
        found = {**found, "image_ranker": task.image_ranker.name}
    return found if task.readers is None else {**found, "reader": task.readers.name}


def _with_ranker(
    load: Callable[..., InterleavedGenerator], task: Task
) -> Callable[..., InterleavedGenerator]:
    if task.image_ranker is None:
        return load
    ranker = task.image_ranker

    def load_with_ranker(*arguments: Any, **named: Any) -> InterleavedGenerator:
        generator = load(*arguments, **named)
        generator.image_ranker = ranker.make()
        return generator

    return load_with_ranker


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
