"""Task x model -> predictions.jsonl -> scores.json -> report: answers, then a pure function of them.

OUT/run/               the run folder of the generation, as `generate` writes it
OUT/predictions.jsonl  {"id", "content"} a line: what was generated, nothing of the prompt; and
                       {"meta": {"ranking"}} where there are candidate answers to rank
OUT/scores.json        flat: "<task>.<metric>" -> number
OUT/report.html        the scores, and the documents with the answers
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.documents.document import Document, Image, document_to_record, part_records
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.documents.formats import read_record
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.images import open_image as load_image
from mm_interleaved.documents.strict_json import FieldError, Record, read_records
from mm_interleaved.errors import InputError, escape
from mm_interleaved.files import make_folder, remove_temporary_files, write_file
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.runs.generate import OnEvent, RunRequest, run_documents
from mm_interleaved.runs.page import OpenImage, render_page

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

logger = logging.getLogger(__name__)

_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class Task:
    """What an evaluation needs to know of a task."""

    read_gold: Callable[[Path], list[Document]]
    """All documents of a data folder, with their targets."""
    score: Callable[[Sequence[Document], Sequence[Document]], dict[str, float]]
    """(predictions, gold) -> metrics."""


def evaluate_model(
    task: Task,
    data: Path,
    request: RunRequest,
    on_event: OnEvent,
    *,
    load: Callable[..., InterleavedGenerator] | None = None,
) -> tuple[dict[str, float], int]:
    """Let a model answer every document of a task, and score it: the scores, and how many documents failed.

    Documents with `candidates` in their meta get a ranking of them too.

    Args:
        request: its `documents` are replaced by the task's; its `output` is OUT above.
        load: see `run_documents`; default: `load_generator`.
    """
    load = cache(load or load_generator)
    out = request.output
    gold = task.read_gold(data)
    make_folder(out)
    # The model must not see the gold answers, and the run must not depend on them.
    questions = [replace(document, target=()) for document in gold]
    outcome = run_documents(replace(request, documents=questions, output=out / "run"), on_event, load=load)
    predictions = [_prediction(record) for record in outcome.records]
    asked = {document.id: document for document in questions if "candidates" in document.meta}
    for prediction in predictions:
        if prediction["id"] in asked and "error" not in prediction:
            model = request.model
            # Named as `run_documents` names them: it is the model that has just answered, not a second one.
            generator = load(
                find_model(model.name),
                device=model.device,
                dtype=model.dtype,
                acceleration=model.acceleration,
            )
            prediction["meta"] = {"ranking": _ranking(generator, asked[prediction["id"]])}
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    write_file(out / "predictions.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
    scores, answers = _score(task, gold, out / "predictions.jsonl")
    made_by = f"{len(answers)} of {len(gold)} documents answered"
    _write(out, scores, made_by, outcome.records, lambda path: load_image(out / "run" / path))
    return scores, outcome.num_failed


def evaluate_predictions(task: Task, data: Path, predictions: Path, out: Path) -> dict[str, float]:
    """Score answers that are there already; writes scores.json and report.html into `out`."""
    gold = task.read_gold(data)
    scores, answers = _score(task, gold, predictions)
    pictures: dict[str, Image] = {}

    def keep(image: Image, _: int) -> str:
        name = str(len(pictures))
        pictures[name] = image
        return name

    records = [document_to_record(answer, keep) for answer in answers]
    made_by = f"{len(answers)} of {len(gold)} documents answered"
    _write(out, scores, made_by, records, lambda name: pictures[name].load())
    return scores


def _ranking(generator: InterleavedGenerator, document: Document) -> list[int]:
    """The ranking; an empty one, which counts as wrong, where a candidate does not fit the model."""
    try:
        return rank_candidates(generator, document)
    except InputError as error:
        logger.warning(
            "document %r: its candidates are not ranked (%s); it counts as wrong", document.id, error
        )
        return []


def rank_candidates(generator: InterleavedGenerator, document: Document) -> list[int]:
    """Indices of a document's candidate answers, from the likeliest to the least likely."""
    scores = generator.score_options(document, document.meta["candidates"])
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def read_predictions(path: Path) -> list[Document]:
    """The answers of a predictions file. Failed and empty ones are left out: they count as wrong.

    Raises:
        InputError: an id occurs twice.
    """
    return _read_predictions(path)[0]


def _read_predictions(path: Path) -> tuple[list[Document], dict[str, str]]:
    """The answers, and the place of every line by its id."""
    folder = ImageFolder(path.parent, path.parent)
    answers: list[Document] = []
    places: dict[str, str] = {}
    for record in read_records(path):
        fields = record.field.object()
        is_empty = "error" in fields or not fields.get("content", True)
        answer = None if is_empty else read_record(record, folder)
        key = _id_of(record) if answer is None else answer.id
        if key in places:
            raise InputError(
                f"{record.place}: id {escape(key)!r} occurs twice, first at {places[key]}", field="id"
            )
        places[key] = record.place
        answers += [] if answer is None else [answer]
    return answers, places


def _id_of(record: Record) -> str:
    try:
        return record.field["id"].text()
    except FieldError as error:
        raise error.at(record.place) from error


def _check_ids(path: Path, places: Mapping[str, str], wanted: Sequence[str]):
    known = set(wanted)
    unknown = [key for key in places if key not in known]
    if unknown:
        raise InputError(
            f"{places[unknown[0]]}: {_listed(unknown)} not among the task's documents", field="id"
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


def read_document_folder(data: Path) -> list[Document]:
    """The documents of a folder that `data storyworld` wrote, or of a file."""
    return read_documents(data / "documents.jsonl" if data.is_dir() else data)


def _score(
    task: Task, gold: Sequence[Document], predictions: Path
) -> tuple[dict[str, float], Sequence[Document]]:
    answers, places = _read_predictions(predictions)
    _check_ids(predictions, places, [document.id for document in gold])
    return task.score(answers, gold), answers


def _write(
    out: Path,
    scores: Mapping[str, float],
    made_by: str,
    records: Sequence[Mapping[str, Any]],
    open_image: OpenImage,
):
    make_folder(out)
    remove_temporary_files(out)
    write_file(out / "scores.json", json.dumps(scores, indent=2).encode() + b"\n")
    page = render_page(records, open_image, title="Evaluation", made_by=made_by, scores=scores)
    write_file(out / "report.html", page)


def _prediction(record: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in record:
        return dict(record)
    parts = [part for part in part_records(record) if part.get("generated")]
    return {"id": record["id"], "content": [_relocated(part) for part in parts]}


def _relocated(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "image": f"run/{part['image']}"} if part["type"] == "image" else dict(part)
