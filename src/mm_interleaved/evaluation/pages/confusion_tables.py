"""What is lost, as tables: shares by task and attribute, and which value was read for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_interleaved.evaluation.metrics.confusion import Confusion
from mm_interleaved.evaluation.pages.markup import NONE, cell, percent, table, text_of, words_of_name

_NOTE = (
    "Share of cases in which an attribute was read otherwise than it should be, and the number of cases. "
    "Images and texts are read by programs that know this world; answers are counted by what their question "
    "asks for."
)
_EMPTY = '<td class="none">·</td>'


def confusion_record(tables: Sequence[Confusion]) -> dict[str, Any]:
    """All tables as JSON values: rows of `counts` are truths, columns what was read."""
    return {
        "tables": [
            {
                "task": each.task,
                "attribute": each.attribute,
                "cases": each.cases,
                "lost": round(each.lost, 6),
                "truth": each.truths,
                "read": each.reads,
                "counts": [[each.counts[truth, read] for read in each.reads] for truth in each.truths],
            }
            for each in tables
        ]
    }


def confusions_markup(tables: Sequence[Confusion]) -> str:
    """The table of shares, then under each task its tables of values."""
    if not tables:
        return ""
    by_task: dict[str, list[Confusion]] = {}
    for each in tables:
        by_task.setdefault(each.task, []).append(each)
    details = "".join(_task_markup(task, members) for task, members in sorted(by_task.items()))
    return f'<p class="note">{text_of(_NOTE)}</p>{shares_markup(by_task)}{details}'


def shares_markup(by_task: Mapping[str, Sequence[Confusion]]) -> str:
    """Lost shares: a row a task, a column an attribute; what is lost most often comes first."""
    lost: dict[str, float] = {}
    for each in (each for members in by_task.values() for each in members):
        lost[each.attribute] = lost.get(each.attribute, 0) + each.lost * each.cases
    attributes = sorted(lost, key=lambda name: -lost[name])
    rows = []
    for task, members in sorted(by_task.items()):
        own = {each.attribute: each for each in members}
        rows.append((words_of_name(task), [_share_cell(own.get(name)) for name in attributes]))
    heads = ["task", *map(words_of_name, attributes)]
    return table("Which attribute is lost, by task", heads, rows)


def _share_cell(found: Confusion | None) -> str:
    if found is None or not found.cases:
        return NONE
    return cell(f"{percent(found.lost)} <small>of {found.cases}</small>", share=found.lost)


def _task_markup(task: str, members: Sequence[Confusion]) -> str:
    wrong = [each for each in members if any(truth != read for truth, read in each.counts)]
    whole = ", ".join(words_of_name(each.attribute) for each in members if each not in wrong)
    kept = f'<p class="note">Nothing lost: {whole}.</p>' if whole else ""
    matrices = "".join(map(_matrix, sorted(wrong, key=lambda each: -each.lost)))
    worst = max(members, key=lambda each: each.lost)
    most = f"; most: {words_of_name(worst.attribute)}, {percent(worst.lost)}" if wrong else ""
    number = f"{len(wrong)} of {len(members)} attributes with losses"
    summary = f"<summary>{words_of_name(task)}: {number}{most}</summary>"
    return f'<details>{summary}<div class="matrices">{matrices}</div>{kept}</details>'


def _matrix(found: Confusion) -> str:
    rows = []
    for truth in found.truths:
        total = sum(found.counts[truth, read] for read in found.reads)
        cells = []
        for read in found.reads:
            count = found.counts[truth, read]
            is_right = truth == read
            cells.append(cell(str(count), share=count / total, is_good=is_right) if count else _EMPTY)
        rows.append((text_of(truth), cells))
    caption = f"{found.attribute.replace('_', ' ')}: {found.cases} cases, truth in rows"
    return table(caption, ["truth", *map(text_of, found.reads)], rows, "matrix")
