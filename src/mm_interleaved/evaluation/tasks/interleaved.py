"""Benchmarks of interleaved generation: judge-free scores, a judge's where one is given, and files for
their own evaluators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

import numpy as np

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.evaluation.answers import by_gold, parts_of
from mm_interleaved.evaluation.interleaved.registry import BENCHMARKS
from mm_interleaved.evaluation.judges.judge import Judge, RememberingJudge
from mm_interleaved.evaluation.metrics.interleaved import (
    IMAGE,
    TEXT,
    copy_rate,
    count_agreement,
    repetition,
    structure,
)
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone


def interleaved(name: str, options: TaskOptions) -> Task:
    """The task of a benchmark, a key of `BENCHMARKS`."""
    benchmark = BENCHMARKS[name]
    return Task(
        read_gold=benchmark.read,
        score=partial(_score, name, _judge(options)),
        # A judge is asked for money or time, so what it says of single documents is not asked for again.
        cases=each_alone(partial(_score, name, None)),
        export=benchmark.write,
        notes=() if options.judge is None else (f"judged by {options.judge.name}",),
    )


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
    """What needs nobody to read an image."""
    parts = parts_of(answer)
    kinds = [TEXT if isinstance(part, Text) else IMAGE for part in parts]
    scores = {"answered": float(bool(parts))}
    if question.target:
        wanted = [TEXT if isinstance(part, Text) else IMAGE for part in question.target]
        scores["structure"] = structure(kinds, wanted)
        scores["image_count"] = count_agreement(kinds.count(IMAGE), wanted.count(IMAGE))
    scores["repetition"] = repetition([part.text for part in parts if isinstance(part, Text)])
    given = [_array(part) for part in question.parts if isinstance(part, Image)]
    scores["copy_rate"] = copy_rate([_array(part) for part in parts if isinstance(part, Image)], given)
    return scores


def _array(image: Image) -> np.ndarray:
    return np.asarray(image.load(), np.float32) / 255
