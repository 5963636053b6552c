"""The page of one evaluation: scores, what is lost, the best and the worst, and the documents themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.answers import by_gold, parts_of
from mm_interleaved.evaluation.cases import Extremes, document_score, group_of
from mm_interleaved.evaluation.metrics.confusion import Confusion
from mm_interleaved.evaluation.pages.confusion_tables import confusions_markup
from mm_interleaved.evaluation.pages.markup import (
    NONE,
    cell,
    name_text,
    number_text,
    page,
    parts_markup,
    side,
    table,
    text_of,
    words_of_name,
)
from mm_interleaved.evaluation.task import Cases, Task

MAX_DOCUMENTS = 120
"""A page of more documents than this would be too heavy to open; the rest stands in predictions.jsonl."""


def report_page(
    task: Task,
    made_by: str,
    scores: Mapping[str, float],
    predictions: Sequence[Document],
    gold: Sequence[Document],
    *,
    cases: Sequence[Cases] = (),
    tables: Sequence[Confusion] = (),
    chosen: Mapping[str, Extremes] | None = None,
    errors: Mapping[str, str] | None = None,
) -> bytes:
    """The page, UTF-8.

    Args:
        made_by: the line under the title.
        cases: of each gold document; none where the task has none.
        chosen: places of the best, median and worst gold documents, by group.
        errors: why documents failed, by id.
    """
    shown = _Documents(task, by_gold(predictions, gold), gold, cases, errors or {})
    sections = (
        ("scores", "Scores", _scores_markup(scores)),
        ("lost", "What is lost", confusions_markup(tables)),
        ("gallery", "Best, median and worst", _gallery(shown, chosen or {})),
        ("documents", "Documents", _all_documents(shown)),
    )
    return page(f"Evaluation: {task.name or 'documents'}", made_by, sections)


def _scores_markup(scores: Mapping[str, float]) -> str:
    main = {name: value for name, value in scores.items() if not name.startswith("held_out.")}
    held_out = {name.removeprefix("held_out."): scores[name] for name in scores if name not in main}
    heads = ["metric", "score", ""] + (["held-out"] if held_out else [])
    rows = []
    for name, value in main.items():
        cells = [cell(number_text(value)), cell(_bar(value))]
        if held_out:
            cells.append(cell(number_text(held_out[name])) if name in held_out else NONE)
        rows.append((text_of(name), cells))
    note = (
        '<p class="note">Held-out: of documents with a combination of species and colour that training never '
        "shows.</p>"
        if held_out
        else ""
    )
    return table("Metrics", heads, rows, "scores") + note


def _bar(value: float) -> str:
    """The value as a bar; nothing for what lies outside of 0 to 1."""
    if not 0 <= value <= 1:
        return ""
    return (
        '<svg class="bar" aria-hidden="true"><rect class="track" width="100%" height="100%" rx="2"/>'
        f'<rect class="value" width="{100 * value:.1f}%" height="100%" rx="2"/></svg>'
    )


class _Documents:
    """Documents as cards."""

    def __init__(
        self,
        task: Task,
        answers: Sequence[Document | None],
        gold: Sequence[Document],
        cases: Sequence[Cases],
        errors: Mapping[str, str],
    ):
        self.task, self.answers, self.gold, self.cases, self.errors = task, answers, gold, cases, errors

    def card(self, place: int, kind: str = "") -> str:
        """What was asked, what was answered, and what is true.

        Args:
            kind: "best", "median" or "worst".
        """
        truth, answer = self.gold[place], self.answers[place]
        own = self.cases[place] if self.cases else {}
        value = document_score(own)
        score = "" if value is None else f'<span class="score">{number_text(value)}</span>'
        mark = f'<span class="kind {kind}">{kind}</span>' if kind else ""
        group = words_of_name(group_of(self.task, truth))
        error = self.errors.get(truth.id)
        answered = (
            f'<p class="broken">not finished: {text_of(error)}</p>'
            if error is not None
            else parts_markup(parts_of(answer), "the answer")
        )
        sides = side("asked", parts_markup(truth.parts, "what was asked")) + side("answered", answered)
        if truth.target:
            sides += side("truth", parts_markup(truth.target, "the truth"))
        metrics = "".join(
            f"<span>{text_of(name)} {number_text(fmean(values))}</span>"
            for name, values in own.items()
            if values and not name.startswith("held_out.")
        )
        return (
            f'<article class="case"><header>{mark}<h4>{name_text(truth.id)}</h4><small>{group}</small>{score}'
            f'</header><div class="sides">{sides}</div><p class="metrics">{metrics}</p></article>'
        )


def _gallery(shown: _Documents, chosen: Mapping[str, Extremes]) -> str:
    groups = []
    for group, found in chosen.items():
        cards = "".join(
            shown.card(place, kind)
            for kind, places in (("best", found.best), ("median", found.median), ("worst", found.worst))
            for place in places
        )
        groups.append(f'<h3>{words_of_name(group)}</h3><div class="extremes">{cards}</div>')
    note = (
        '<p class="note">By the mean of each document\'s own scores; equal ones in the order of the data.</p>'
    )
    return note + "".join(groups) if groups else ""


def _all_documents(shown: _Documents) -> str:
    """The first ones, closed until they are asked for, by group."""
    groups: dict[str, list[int]] = {}
    for place, document in enumerate(shown.gold[:MAX_DOCUMENTS]):
        groups.setdefault(group_of(shown.task, document), []).append(place)
    markup = "".join(
        f"<details><summary>{words_of_name(group)}: {len(places)} documents</summary>"
        f"{''.join(map(shown.card, places))}</details>"
        for group, places in sorted(groups.items())
    )
    left = len(shown.gold) - MAX_DOCUMENTS
    return markup + (f'<p class="note">{left} more stand in predictions.jsonl.</p>' if left > 0 else "")
