"""Predictions: what a model generated of each document, as lines of a file, and back.

{"id", "content"} a line: what was generated, nothing of the prompt; {"meta": {"ranking"}} where there are
candidate answers to rank, {"meta": {"reading"}} where somebody looked at the images (see `judge_free`);
{"id", "error"} where a document failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, part_records
from mm_interleaved.documents.formats import read_record
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.record_files import Record, read_records
from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import InputError, escape

_MAX_NAMED = 10


def prediction_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The line of predictions for a line of a run's results; its images lie in the run's folder, `run/`."""
    if "error" in record:
        return dict(record)
    parts = [part for part in part_records(record) if part.get("generated")]
    found = record.get("meta", {})
    meta = {key: found[key] for key in ("ranking", "reading") if found.get(key) is not None}
    return {
        "id": record["id"],
        "content": [_relocated(part) for part in parts],
        **({"meta": meta} if meta else {}),
    }


def _relocated(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "image": f"run/{part['image']}"} if part["type"] == "image" else dict(part)


def read_predictions(path: Path, gold: Sequence[Document] | None = None) -> list[Document]:
    """The answers of a predictions file. Failed and empty ones are left out: they count as wrong.

    Args:
        gold: the documents of the task, each of which needs a line; None accepts any lines.

    Raises:
        InputError: an id occurs twice, is none of the gold documents', or one of theirs is missing; a ranking
            does not hold each candidate of its document once.
    """
    folder = ImageFolder(path.parent, path.parent)
    answers: list[Document] = []
    places: dict[str, str] = {}
    counts = {document.id: len(document.meta.get("candidates") or ()) for document in gold or ()}
    for record in read_records(path):
        fields = _object(record)
        # `read_record` refuses documents without parts; an answer may have none, and counts as wrong.
        is_empty = "error" in fields or not fields.get("content", True)
        answer = None if is_empty else read_record(record, folder)
        key = _id_of(record) if answer is None else answer.id
        if key in places:
            raise InputError(
                f"{record.place}: id {escape(key)!r} occurs twice, first at {places[key]}", field="id"
            )
        places[key] = record.place
        if answer is not None and counts.get(key) and "ranking" in answer.meta:
            _check_ranking(record.place, answer.meta["ranking"], counts[key])
        answers += [] if answer is None else [answer]
    if gold is not None:
        _check_ids(path, places, [document.id for document in gold])
    return answers


def _object(record: Record) -> Mapping[str, Any]:
    try:
        return record.field.object()
    except FieldError as error:
        raise error.at(record.place) from error


def _check_ranking(place: str, ranking: object, count: int):
    """Refuses what does not rank all candidates; an empty list says that they were not ranked."""
    indices: list[int] = []
    if isinstance(ranking, list):
        indices = [one if type(one) is int else -1 for one in ranking]
    if ranking != [] and sorted(indices) != list(range(count)):
        raise InputError(
            f"{place}: meta.ranking: found {escape(str(ranking), 60)}, expected the candidates 0 to "
            f"{count - 1}, each once, from the likeliest on",
            field="meta.ranking",
        )


def _id_of(record: Record) -> str:
    try:
        return record.field["id"].text()
    except FieldError as error:
        raise error.at(record.place) from error


def _check_ids(path: Path, places: Mapping[str, str], wanted: Sequence[str]):
    """Refuses lines for other documents than those of the task, and a document without a line."""
    known = set(wanted)
    unknown = [key for key in places if key not in known]
    if unknown:
        raise InputError(
            f"{places[unknown[0]]}: {_listed(unknown)} not among the task's {len(wanted)} documents, such as "
            f"{escape(next(iter(wanted), ''), 60)!r}",
            field="id",
        )
    missing = [key for key in wanted if key not in places]
    if missing:
        raise InputError(
            f"{path}: {_listed(missing)} missing, expected a line for each of the task's {len(wanted)} "
            'documents (one without an answer: {"id": ..., "content": []})',
            field="id",
        )


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(escape(key, 60)) for key in ids[:_MAX_NAMED])
    more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
    return f"id {shown} is" if len(ids) == 1 else f"{len(ids)} ids ({shown}{more}) are"
