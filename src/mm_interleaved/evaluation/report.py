"""The scores as a file, and as a page with the documents and the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.cases import Extremes, cases_of, document_score, extremes
from mm_interleaved.evaluation.pages.confusion_tables import confusion_record
from mm_interleaved.evaluation.pages.report import report_page
from mm_interleaved.evaluation.task import Cases, Task
from mm_interleaved.files import make_folder, remove_temporary_files, write_file

_NUM_SHOWN = 2
"""Documents of each kind in a group's gallery."""


def write_report(
    out: Path,
    task: Task,
    scores: Mapping[str, float],
    predictions: Sequence[Document],
    gold: Sequence[Document],
    *,
    errors: Mapping[str, str] | None = None,
) -> None:
    """Writes scores.json and report.html; where single documents have scores gallery.json, where the truth of
    attributes is known confusion.json.

    Args:
        errors: why documents failed, by id.
    """
    make_folder(out)
    remove_temporary_files(out)
    write_file(out / "scores.json", json.dumps(scores, indent=2).encode() + b"\n")
    cases = [] if task.cases is None else cases_of(task, predictions, gold)
    chosen = extremes(task, gold, cases, _NUM_SHOWN) if cases else {}
    tables = [] if task.confusions is None else task.confusions(predictions, gold)
    if chosen:
        _write_json(out / "gallery.json", gallery_record(gold, cases, chosen))
    if tables:
        _write_json(out / "confusion.json", confusion_record(tables))
    made_by = "; ".join((f"{len(predictions)} of {len(gold)} documents answered", *task.notes))
    page = report_page(
        task, made_by, scores, predictions, gold, cases=cases, tables=tables, chosen=chosen, errors=errors
    )
    write_file(out / "report.html", page)


def gallery_record(
    gold: Sequence[Document], cases: Sequence[Cases], chosen: Mapping[str, Extremes]
) -> dict[str, Any]:
    """By group and kind: id and score of the documents that are shown."""
    return {
        group: {
            kind: [
                {"id": gold[place].id, "score": document_score(cases[place])}
                for place in getattr(found, kind)
            ]
            for kind in ("best", "median", "worst")
        }
        for group, found in chosen.items()
    }


def _write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
