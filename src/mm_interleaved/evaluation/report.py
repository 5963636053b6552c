"""The scores as a file, and as a page with the documents and the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.task import Task
from mm_interleaved.files import make_folder, remove_temporary_files, write_file
from mm_interleaved.runs.page import OpenImage, render_page
from mm_interleaved.versions import __version__

RECORD = "evaluation.json"


def write_record(
    out: Path,
    task: Task,
    data: Path,
    gold: Sequence[Document],
    digest: str,
    *,
    flags: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> None:
    """Writes what the scores were made with; the model, its hash and the machine stand in
    `run/manifest.json`.

    Args:
        digest: of the gold documents, see `hash_documents`.
        flags: generation settings that outrank the documents' own; None where no model ran.
        seconds: of reading, answering and scoring.
    """
    first = gold[0]
    record = {
        "data": {"path": str(data), "sha256": digest, "documents": len(gold)},
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
    scores: Mapping[str, float],
    made_by: str,
    records: Sequence[Mapping[str, Any]],
    open_image: OpenImage,
) -> None:
    """Writes scores.json and report.html.

    Args:
        made_by: a sentence on how many documents were answered.
        records: of the answered documents, in the canonical form.
        open_image: gives the image that a record names.
    """
    make_folder(out)
    remove_temporary_files(out)
    write_file(out / "scores.json", json.dumps(scores, indent=2).encode() + b"\n")
    page = render_page(records, open_image, title="Evaluation", made_by=made_by, scores=scores)
    write_file(out / "report.html", page)
