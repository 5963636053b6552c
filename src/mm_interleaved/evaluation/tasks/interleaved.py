"""Benchmarks of interleaved generation: judge-free scores, a judge's where one is given, and files for
their own evaluators. What has to be looked at in images is read while documents are answered (`readers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.answers import by_gold, parts_of
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS
from mm_interleaved.evaluation.judge_free import judge_free_scores, reading_of
from mm_interleaved.evaluation.judges.judge import Judge, RememberingJudge
from mm_interleaved.evaluation.readers import readers_of
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone


def interleaved(name: str, options: TaskOptions) -> Task:
    """The task of a benchmark, a key of `BENCHMARKS`."""
    benchmark = BENCHMARKS[name]
    return Task(
        read_gold=benchmark.read,
        score=partial(_score, name, _judge(options)),
        # A judge is asked for money or time, so what it says of single documents is not asked for again.
        cases=each_alone(partial(_score, name, None)),
        readers=readers_of(options.clip),
        export=benchmark.write,
        notes=_notes(options),
    )


def _notes(options: TaskOptions) -> tuple[str, ...]:
    reader = "the model itself" if options.clip is None else options.clip
    weighed = f"texts and images are weighed by {reader}, captions are the model's own"
    return (weighed,) if options.judge is None else (weighed, f"judged by {options.judge.name}")


def _judge(options: TaskOptions) -> RememberingJudge | None:
    if options.judge is None:
        return None
    return RememberingJudge(options.judge, options.judge_memory)


def judge_named(url: str | None, model: str | None, key: str = "") -> Judge | None:
    """The judge that a command asks for: behind a URL, on this machine, or none."""
    if url is not None:
        from mm_interleaved.evaluation.judges.url import UrlJudge

        return UrlJudge(url, model or "default", key)
    if model is not None:
        from mm_interleaved.evaluation.judges.local import LocalJudge

        return LocalJudge(model)
    return None


def _score(
    name: str, judge: RememberingJudge | None, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for question, answer in zip(gold, by_gold(predictions, gold), strict=True):
        for metric, value in _scores_of(question, answer).items():
            found.setdefault(f"{name}.{metric}", []).append(value)
        if judge is not None:
            for axis, value in judge(question, answer).scores.items():
                found.setdefault(f"{name}.judge.{axis}", []).append(value)
    return {metric: fmean(values) for metric, values in found.items()}


def _scores_of(question: Document, answer: Document | None) -> dict[str, float]:
    found = judge_free_scores(question, answer, reading_of(question, answer))
    return {"answered": float(bool(parts_of(answer))), **found}
