"""Several evaluations of the same documents, compared: scores with intervals, and where documents differ.

Scores are taken from the predictions again, so that what is compared is what is there; whoever changed one of
the two is told. A metric that is a mean over cases has a bootstrap interval over documents, its difference to
the first evaluation a paired one. Metrics of the set as a whole have them only if they are scored anew on
resampled documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.evaluation.answers import by_gold
from mm_interleaved.evaluation.cases import cases_of
from mm_interleaved.evaluation.metrics.confidence import Interval, bootstrap_ratios, interval_of
from mm_interleaved.evaluation.metrics.confusion import Confusion
from mm_interleaved.evaluation.predictions import read_predictions
from mm_interleaved.evaluation.records import EvaluationRecord, hash_documents, read_record_of, read_scores
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.task import Cases, Task

RESAMPLES = 2000
_MIN_DOCUMENTS = 2
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One evaluation."""

    name: str
    record: EvaluationRecord
    scores: Mapping[str, float]
    predictions: Sequence[Document]
    answers: Sequence[Document | None]
    """By gold document; None where there is none."""
    cases: Sequence[Cases]
    """By gold document; empty ones where the task has none."""
    confusions: Sequence[Confusion]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of all runs."""

    metric: str
    values: Sequence[float | None]
    """By run; None where it lacks the metric."""
    intervals: Sequence[Interval | None]
    """By run; None where the metric is of the set as a whole, or rests on a single document."""
    differences: Sequence[Interval | None]
    """Each run's value less the first one's; the first has none."""
    num_documents: int | None = None
    """How many have cases of it; None where it is of the set as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs on the same documents."""

    task: Task
    gold: Sequence[Document]
    runs: Sequence[Run]
    rows: Sequence[Row]


def compare(
    folders: Mapping[str, Path],
    data: Path | None = None,
    *,
    rescored: int = 0,
    on_done: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Compare evaluations.

    Args:
        folders: by the name of each run, what `evaluate` wrote; the first is the one that others are
            compared with.
        data: the task's documents, where they are no longer where the evaluations found them.
        rescored: on how many resamples metrics of the set as a whole are computed anew, for their intervals.
        on_done: called with a run's name for each of its documents that is scored, and each resample.

    Raises:
        UsageError: fewer than two, or evaluations that cannot be compared: of other tasks or other documents.
        InputError: a folder is no whole evaluation, or its documents have changed since.
    """
    if len(folders) < 2:
        raise UsageError(f"expected two evaluations or more, found {len(folders)}")
    records = {name: read_record_of(folder) for name, folder in folders.items()}
    _check_alike(records)
    first = next(iter(records.values()))
    task = make_task(first.task, first.options)
    gold = _read_gold(task, first, data)
    runs = [_read_run(task, gold, name, record, on_done) for name, record in records.items()]
    metrics = dict.fromkeys(metric for run in runs for metric in run.scores)
    whole = _rescored(task, gold, runs, rescored, on_done) if rescored else {}
    return Comparison(task=task, gold=gold, runs=runs, rows=[_row(name, runs, whole) for name in metrics])


def differ(comparison: Comparison, place: int) -> bool:
    """Whether runs score otherwise on a gold document; where documents have no scores, whether they answer
    otherwise.
    """
    if comparison.task.cases is not None:
        first, *others = [dict(run.cases[place]) for run in comparison.runs]
    else:
        first, *others = [_content(run.answers[place]) for run in comparison.runs]
    return any(other != first for other in others)


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """All numbers as JSON values."""
    runs = [
        {"name": run.name, "folder": str(run.record.folder), "model": run.record.model}
        for run in comparison.runs
    ]
    return {
        "task": comparison.task.name,
        "documents": len(comparison.gold),
        "sha256": comparison.runs[0].record.data_hash,
        "resamples": RESAMPLES,
        "level": 0.95,
        "runs": runs,
        "metrics": {row.metric: _row_record(row) for row in comparison.rows},
    }


def _row_record(row: Row) -> dict[str, Any]:
    def bounds(interval: Interval | None) -> list[float] | None:
        return None if interval is None else [interval.low, interval.high]

    return {
        "documents": row.num_documents,
        "values": list(row.values),
        "intervals": [bounds(each) for each in row.intervals],
        "differences": [None if each is None else each.mean for each in row.differences],
        "difference_intervals": [bounds(each) for each in row.differences],
    }


# ---- Reading ----


def _check_alike(records: Mapping[str, EvaluationRecord]) -> None:
    first, *others = records.values()
    for other in others:
        if other.task != first.task:
            raise UsageError(
                f"{other.folder}: evaluated {other.task!r}, expected {first.task!r} as {first.folder}"
            )
        if other.data_hash != first.data_hash:
            raise UsageError(
                f"{other.folder}: evaluated {other.num_documents} documents with hash "
                f"{other.data_hash[:12]}, expected the {first.num_documents} with {first.data_hash[:12]} of "
                f"{first.folder}: only evaluations of the same documents and prompts can be compared"
            )
        if other.options.compat != first.options.compat:
            raise UsageError(
                f"{other.folder}: scored with compat={other.options.compat}, {first.folder} with "
                f"compat={first.options.compat}; their numbers cannot be compared"
            )


def _read_gold(task: Task, record: EvaluationRecord, data: Path | None) -> list[Document]:
    path = record.data_path if data is None else data
    if not path.exists():
        more = "--data says where they are now" if data is None else "expected a folder or a file"
        raise InputError(f"{escape(str(path))}: there are no documents of {task.name}; {more}", field="data")
    gold = task.read_gold(path)
    digest = hash_documents(gold)
    if digest != record.data_hash:
        raise InputError(
            f"{escape(str(path))}: found {len(gold)} documents with hash {digest[:12]}, expected "
            f"{record.num_documents} with {record.data_hash[:12]}, which {record.folder} was evaluated on",
            field="data",
        )
    return gold


def _read_run(
    task: Task,
    gold: Sequence[Document],
    name: str,
    record: EvaluationRecord,
    on_done: Callable[[str], None],
) -> Run:
    scores = read_scores(record.folder)
    predictions = read_predictions(record.predictions, gold)
    cases = cases_of(task, predictions, gold, lambda: on_done(name))
    for metric, value in scores.items():
        values = [value for own in cases for value in own.get(metric, ())]
        if values and abs(fmean(values) - value) > _TOLERANCE:
            raise InputError(
                f"{record.folder / 'scores.json'}: {escape(metric)}: found {value}, its predictions give "
                f"{fmean(values):.6f}; evaluate again, or compare evaluations of one version",
                field=metric,
            )
    return Run(
        name=name,
        record=record,
        scores=scores,
        predictions=predictions,
        answers=by_gold(predictions, gold),
        cases=cases,
        confusions=[] if task.confusions is None else task.confusions(predictions, gold),
    )


def _content(answer: Document | None) -> list[Any]:
    """The parts of an answer in a form that can be compared."""
    parts = () if answer is None else answer.parts
    return [part.text if isinstance(part, Text) else part.load().tobytes() for part in parts]


# ---- Intervals ----


def _row(metric: str, runs: Sequence[Run], rescored: Mapping[str, np.ndarray]) -> Row:
    values = [run.scores.get(metric) for run in runs]
    cells = [[own.get(metric, ()) for own in run.cases] for run in runs]
    counts_KN = np.array([[len(values) for values in row] for row in cells], float)
    used = np.flatnonzero(counts_KN.any(0)) if counts_KN.size else np.zeros(0, int)
    if not len(used):
        none = [None] * len(runs)
        intervals, differences = _intervals(values, rescored[metric]) if metric in rescored else (none, none)
        return Row(metric=metric, values=values, intervals=intervals, differences=differences)
    intervals = differences = [None] * len(runs)
    if len(used) >= _MIN_DOCUMENTS:
        sums_KN = np.array([[sum(values) for values in row] for row in cells], float)
        resampled_KR = bootstrap_ratios(sums_KN[:, used], counts_KN[:, used], resamples=RESAMPLES)
        intervals, differences = _intervals(values, resampled_KR)
    return Row(
        metric=metric,
        values=values,
        intervals=intervals,
        differences=differences,
        num_documents=len(used),
    )


def _intervals(
    values: Sequence[float | None], resampled_KR: np.ndarray
) -> tuple[list[Interval | None], list[Interval | None]]:
    """Of each run's value, and of its difference to the first run's."""

    def interval(value: float | None, resampled_R: np.ndarray) -> Interval | None:
        return None if value is None or np.isnan(resampled_R).all() else interval_of(value, resampled_R)

    first = values[0]
    differences: list[Interval | None] = [None]
    for value, resampled_R in zip(values[1:], resampled_KR[1:], strict=True):
        by = None if value is None or first is None else value - first
        differences.append(interval(by, resampled_R - resampled_KR[0]))
    return [interval(*pair) for pair in zip(values, resampled_KR, strict=True)], differences


def _rescored(
    task: Task,
    gold: Sequence[Document],
    runs: Sequence[Run],
    resamples: int,
    on_done: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """By metric of the set as a whole: (K, resamples), computed anew on the same resamples for all runs."""
    by_case = {metric for run in runs for own in run.cases for metric in own}
    found: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for index in range(resamples):
        drawn = rng.integers(0, len(gold), size=len(gold))
        for k, run in enumerate(runs):
            # A document that is drawn twice is two documents.
            questions = [replace(gold[place], id=f"{number}") for number, place in enumerate(drawn)]
            answers = [
                replace(answer, id=f"{number}")
                for number, place in enumerate(drawn)
                if (answer := run.answers[place]) is not None
            ]
            for metric, value in task.score(answers, questions).items():
                if metric not in by_case:
                    empty = np.full((len(runs), resamples), np.nan)
                    found.setdefault(metric, empty)[k, index] = value
            on_done(run.name)
    return found
