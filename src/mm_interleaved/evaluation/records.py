"""What numbers were made with: evaluation.json, as `evaluate` writes it.

It is read back strictly, with the scores, where evaluations are compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.documents.record_files import decoded
from mm_interleaved.documents.strict_json import Field, FieldError, parse_strict
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.names import TASK_NAMES
from mm_interleaved.evaluation.task import Task, TaskOptions
from mm_interleaved.files import write_file
from mm_interleaved.versions import __version__

RECORD, SCORES = "evaluation.json", "scores.json"
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """How an evaluation was made."""

    folder: Path
    task: str
    options: TaskOptions
    data_path: Path
    data_hash: str
    num_documents: int
    predictions: Path
    model: str | None
    """Its name and the beginning of its hash; None where no model ran."""
    settings: dict[str, Any]
    """Generation settings that outranked the documents' own."""
    seconds: float | None


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
    prompt: Document | None = None,
    shots: Mapping[str, Any] | None = None,
) -> None:
    """Writes what the scores were made with; the model, its hash and the machine stand in
    `run/manifest.json`.

    Args:
        digest: of the gold documents, see `hash_documents`.
        flags: generation settings that outrank the documents' own; None where no model ran.
        predictions: the file of answers where it is not the one in `out`.
        seconds: of reading, answering and scoring.
        prompt: the first document as it was asked, where that is not the gold one.
        shots: which examples stand before each document.
    """
    first = prompt or gold[0]
    record = {
        "task": task.name,
        "options": _options_record(task.options),
        "predictions": "predictions.jsonl" if predictions is None else str(predictions.absolute()),
        "data": {"path": str(data.absolute()), "sha256": digest, "documents": len(gold)},
        "prompt": [part.text if isinstance(part, Text) else "<image>" for part in first.parts],
        "shots": None if shots is None else dict(shots),
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
        "segmenter": options.segmenter,
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


def read_record_of(folder: Path) -> EvaluationRecord:
    """The record of a folder that `evaluate` wrote. Raises InputError for any other."""
    path = folder / RECORD
    found = _read(path)
    try:
        data, options = found["data"], found["options"]
        if (name := found["task"].text()) not in TASK_NAMES:
            found["task"].wrong("a task of `evaluate`")
        seconds, settings = found["seconds"].value, found["settings"].value
        return EvaluationRecord(
            folder=folder,
            task=name,
            options=TaskOptions(
                compat=_text_or_none(options["compat"]),
                prompt=_text_or_none(options["prompt"]),
                inception=_path_or_none(options["inception"]),
                clip=_text_or_none(options["clip"]),
                segmenter=_text_or_none(options["segmenter"]),
                source=options["source"].object(),
            ),
            data_path=Path(data["path"].text()),
            data_hash=data["sha256"].text(),
            num_documents=data["documents"].integer(0, 2**53),
            predictions=folder / found["predictions"].text(),
            model=_model(folder, found["run"]),
            settings=dict(settings) if isinstance(settings, dict) else {},
            seconds=float(seconds) if isinstance(seconds, int | float) else None,
        )
    except FieldError as error:
        raise error.at(str(path)) from error


def read_scores(folder: Path) -> dict[str, float]:
    """The flat numbers of scores.json. Raises InputError where it is anything else."""
    path = folder / SCORES
    values = _read(path)
    try:
        scores: dict[str, float] = {}
        for name, value in values.object().items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                values[name].wrong("a number")
            scores[name] = float(value)
        return scores
    except FieldError as error:
        raise error.at(str(path)) from error


def _read(path: Path) -> Field:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
    except FileNotFoundError as error:
        raise InputError(
            f"{escape(str(path))}: there is no such file, expected a folder that `evaluate` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{escape(str(path))}: cannot be read ({getattr(error, 'strerror', error)})"
        ) from error
    return Field(parse_strict(decoded(data, str(path), is_start=True), str(path)))


def _text_or_none(field: Field) -> str | None:
    return None if field.value is None else field.text()


def _path_or_none(field: Field) -> Path | None:
    text = _text_or_none(field)
    return None if text is None else Path(text)


def _model(folder: Path, manifest: Field) -> str | None:
    if manifest.value is None:
        return None
    path = folder / manifest.text()
    found = _read(path)
    try:
        return f"{found['model']['name'].text()} ({found['model']['sha256'].text()[:12]})"
    except FieldError as error:
        raise error.at(str(path)) from error
