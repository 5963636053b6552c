"""The scores as a file, and as a page with the documents and the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.cases import Extremes, cases_of, document_score, extremes
from mm_interleaved.evaluation.pages.confusion_tables import confusion_record
from mm_interleaved.evaluation.pages.report import report_page
from mm_interleaved.evaluation.task import Cases, Task, TaskOptions
from mm_interleaved.files import make_folder, remove_temporary_files, write_file
from mm_interleaved.versions import __version__

RECORD = "evaluation.json"
_NUM_SHOWN = 2
"""Documents of each kind in a group's gallery."""


def write_record(
    out: Path,
    task: Task,
    data: Path,
    gold: Sequence[Document],
    digest: str,
    *,
    flags: Mapping[str, Any] | None = None,
    predictions: Path | None = None,
    seconds: float | None = None,
) -> None:
    """Writes what the scores were made with; the model, its hash and the machine stand in
    `run/manifest.json`.

    Args:
        digest: of the gold documents, see `hash_documents`.
        flags: generation settings that outrank the documents' own; None where no model ran.
        predictions: the file of answers where it is not the one in `out`.
        seconds: of reading, answering and scoring.
    """
    first = gold[0]
    record = {
        "task": task.name,
        "options": _options_record(task.options),
        "predictions": "predictions.jsonl" if predictions is None else str(predictions.absolute()),
        "data": {"path": str(data.absolute()), "sha256": digest, "documents": len(gold)},
        "prompt": [part.text if isinstance(part, Text) else "<image>" for part in first.parts],
        "published_settings": dict(task.settings),
        "settings": None if flags is None else dict(flags),
        "notes": list(task.notes),
        "seconds": seconds,
        "run": "run/manifest.json" if flags is not None else None,
        "version": __version__,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_file(out / RECORD, text.encode("utf-8", "backslashreplace"))


def _options_record(options: TaskOptions) -> dict[str, Any]:
    """Those options without which the same task is another one; a judge is named in the notes."""
    return {
        "compat": options.compat,
        "prompt": options.prompt,
        "inception": None if options.inception is None else str(options.inception.absolute()),
        "clip": options.clip,
        "source": dict(options.source),
    }


def hash_documents(documents: Sequence[Document]) -> str:
    """SHA-256 of what is asked and of its answers: texts, pixels and order, wherever the files lie.

    Raises:
        InputError: an image cannot be read; another in its place, or none, would be another benchmark.
    """
    total = hashlib.sha256()
    for document in documents:
        total.update(document.id.encode("utf-8", "backslashreplace"))
        for part in (*document.parts, *document.target):
            kind, content = _content(document, part)
            total.update(kind + len(content).to_bytes(8, "big") + content)
    return total.hexdigest()


def _content(document: Document, part: Part) -> tuple[bytes, bytes]:
    if isinstance(part, Text):
        return b"T", part.text.encode("utf-8", "backslashreplace")
    try:
        return b"I", part.load().tobytes()
    except InputError as error:
        raise InputError(f"document {escape(document.id)!r}: {error}", field=error.field) from error


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
