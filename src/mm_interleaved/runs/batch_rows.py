"""Batches and what became of them as rows of plain columns, which any machine can read: JSON, and files.

    batch    {"id", "content": JSON of documents and settings, "images": encoded files of given images}
    outcome  {"id", "content": JSON of what was generated, or of errors, "images": PNG files}

No pickles: a row may lie on a disk, and what lies there is never trusted to run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.images import read_regular_file, to_png
from mm_interleaved.errors import (
    ImageError,
    InputError,
    MMInterleavedError,
    ModelFileError,
    NumericalError,
    StorageError,
    TooLongError,
    UsageError,
)
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.runs.engine import Batch

Row: TypeAlias = dict[str, Any]
Outcome: TypeAlias = Document | MMInterleavedError

_ERRORS = {
    kind.__name__: kind
    for kind in (
        MMInterleavedError, UsageError, InputError, ImageError, TooLongError, ModelFileError, NumericalError,
        StorageError,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What became of a batch on some machine."""

    id: str
    outcomes: Sequence[Outcome]
    """Of each document, in the batch's order: the completed one, or its own error. Empty with `error`."""
    error: MMInterleavedError | None = None
    """What is wrong for all documents: the model, its settings, this machine's memory."""
    warnings: Sequence[str] = ()
    """What was logged on the way, for whoever watches the run."""


def batch_id(batch: Batch) -> str:
    """A batch's name within its run; sorts as the batches do."""
    return f"{batch.start:012d}"


def row_of_batch(batch: Batch) -> Row:
    """A batch with the bytes of its images; an image that cannot be read stays the name of a file."""
    images: list[bytes] = []
    documents = [_document_record(document, images) for document in batch.documents]
    content = {"documents": documents, "settings": [each.to_dict() for each in batch.settings]}
    return {"id": batch_id(batch), "content": json.dumps(content), "images": images}


def batch_of_row(row: Mapping[str, Any]) -> tuple[list[Document], list[GenerationSettings]]:
    """The documents of a row, and the settings of each."""
    content = json.loads(row["content"])
    documents = [_document(record, row["images"]) for record in content["documents"]]
    return documents, [GenerationSettings.combine(each) for each in content["settings"]]


def row_of_outcome(documents: Sequence[Document], found: BatchOutcome) -> Row:
    """What became of documents: what was generated, without what was given."""
    images: list[bytes] = []
    outcomes = [
        _error_record(outcome)
        if isinstance(outcome, MMInterleavedError)
        else {"parts": [_part_record(part, images) for part in _added(document, outcome)]}
        for document, outcome in zip(documents, found.outcomes, strict=bool(found.outcomes))
    ]
    error = None if found.error is None else _error_record(found.error)
    content = {"outcomes": outcomes, "error": error, "warnings": list(found.warnings)}
    return {"id": found.id, "content": json.dumps(content), "images": images}


def outcome_of_row(documents: Sequence[Document], row: Mapping[str, Any]) -> BatchOutcome:
    """The same again, beside the documents as they are here.

    Raises:
        ValueError, LookupError, TypeError: the row is damaged, or of other documents.
    """
    content = json.loads(row["content"])
    outcomes: list[Outcome] = []
    for document, record in zip(documents, content["outcomes"], strict=content["error"] is None):
        if "error" in record:
            outcomes.append(_error(record))
        else:
            outcomes.append(document.extended(*(_part(part, row["images"]) for part in record["parts"])))
    error = None if content["error"] is None else _error(content["error"])
    return BatchOutcome(row["id"], outcomes, error, content["warnings"])


def _added(document: Document, completed: Document) -> tuple[Part, ...]:
    """What a completed document has more than the given one."""
    count = len(document.parts)
    if replace(completed, parts=completed.parts[:count]) != document:
        raise AssertionError("a completed document begins with the given one")
    return completed.parts[count:]


def _document_record(document: Document, images: list[bytes]) -> Row:
    return {
        "id": document.id,
        "parts": [_part_record(part, images) for part in document.parts],
        "layout": document.layout,
        "generation": dict(document.generation),
    }


def _document(record: Mapping[str, Any], images: Sequence[bytes]) -> Document:
    values: Row = {**record, "parts": tuple(_part(part, images) for part in record["parts"])}
    return Document(**values)


def _part_record(part: Part, images: list[bytes]) -> Row:
    """A part's fields; in place of an image the number of its file among `images`, or a path."""
    record = {field.name: getattr(part, field.name) for field in fields(part)}
    if isinstance(part, Text):
        return record
    data = _encoded(part)
    if data is None:
        source: int | str = str(part.source)
    else:
        source = len(images)
        images.append(data)
    name = part.name or (str(part.source) if isinstance(part.source, Path) else None)
    return {**record, "source": source, "name": name}


def _part(record: Mapping[str, Any], images: Sequence[bytes]) -> Part:
    if "text" in record:
        return Text(**record)
    source = record["source"]
    values: Row = {**record, "source": Path(source) if isinstance(source, str) else images[source]}
    return Image(**values)


def _encoded(image: Image) -> bytes | None:
    """The bytes of an image's file; None where there are none, which fails again where it is opened."""
    if isinstance(image.source, bytes):
        return image.source
    if not isinstance(image.source, Path):
        return to_png(image.source)
    try:
        return read_regular_file(image.source, image.name)
    except ImageError:
        return None


def _error_record(error: MMInterleavedError) -> Row:
    known = next(kind for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    return {"error": known.__name__, "message": str(error), "field": error.field}


def _error(record: Mapping[str, Any]) -> MMInterleavedError:
    return _ERRORS[record["error"]](record["message"], field=record["field"])
