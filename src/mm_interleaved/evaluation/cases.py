"""What single documents add to the scores: for intervals, and to find the best and the worst of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.answers import by_gold
from mm_interleaved.evaluation.task import Cases, Task

LOWER_IS_BETTER = frozenset({"mean_rank", "fid", "kid", "copy_rate", "repetition"})
"""Last words of the names of such metrics; of all others more is better, or they are neither."""
_NOT_OF_A_DOCUMENT = ("layout.", "held_out.")
_BESIDE = frozenset({"yes_ratio"})
"""Metrics that are neither good nor bad."""


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.rpartition(".")[2].lower() in LOWER_IS_BETTER


def cases_of(
    task: Task,
    predictions: Sequence[Document],
    gold: Sequence[Document],
    on_done: Callable[[], None] = lambda: None,
) -> list[Cases]:
    """The cases of each gold document; empty ones where the task has none."""
    found: list[Cases] = []
    for document, prediction in zip(gold, by_gold(predictions, gold), strict=True):
        found.append({} if task.cases is None else task.cases(prediction, document))
        on_done()
    return found


def document_score(cases: Cases) -> float | None:
    """How good one document is, of those metrics that are better the more they are: the mean of their means.
    None where it has none of them.
    """
    values = [
        fmean(values)
        for metric, values in cases.items()
        if values
        and not metric.startswith(_NOT_OF_A_DOCUMENT)
        and not is_lower_better(metric)
        and metric.rpartition(".")[2] not in _BESIDE
    ]
    return fmean(values) if values else None


def group_of(task: Task, document: Document) -> str:
    """Which of a data set's tasks a document belongs to: `meta.task`, else the task's own name."""
    own = document.meta.get("task")
    return own if isinstance(own, str) and own else task.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """The best, middle and worst documents of a group, as their places among the gold documents."""

    best: tuple[int, ...]
    median: tuple[int, ...]
    worst: tuple[int, ...]


def extremes(
    task: Task, gold: Sequence[Document], cases: Sequence[Cases], count: int
) -> Mapping[str, Extremes]:
    """By group: so many documents of each kind, none of them twice; of equals the one that stands first.

    Groups whose documents have no score of their own are left out.
    """
    groups: dict[str, list[tuple[float, int]]] = {}
    for place, (document, own) in enumerate(zip(gold, cases, strict=True)):
        value = document_score(own)
        if value is not None:
            groups.setdefault(group_of(task, document), []).append((value, place))
    return {name: _extremes(members, count) for name, members in groups.items()}


def _extremes(members: Sequence[tuple[float, int]], count: int) -> Extremes:
    ordered = [place for _, place in sorted(members, key=lambda member: (-member[0], member[1]))]
    # Where documents are few, the worst are worth more than the best, and these more than a middle.
    begin_of_worst = max(0, len(ordered) - count)
    end_of_best = min(count, begin_of_worst)
    middle = min(max((len(ordered) - count) // 2, end_of_best), max(begin_of_worst - count, end_of_best))
    return Extremes(
        best=tuple(ordered[:end_of_best]),
        median=tuple(ordered[middle : min(middle + count, begin_of_worst)]),
        worst=tuple(reversed(ordered[begin_of_worst:])),
    )
