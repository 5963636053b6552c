"""Benchmarks whose record is one query: UEval, InterSyn and InterleavedBench.

UEval (arXiv 2601.22155): `{"id", "prompt" or "question", "image"?}`; answers `[{"id", "text_answer",
"image_answer": [paths]}]`. InterSyn (arXiv 2506.09427): `{"id", "question", "answer", "image"}`, answered
in the same shape. InterleavedBench (arXiv 2406.14643): `{"id", "task_name", "prompt", "images"?}`; answers
`{"id", "text", "images"}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.evaluation.interleaved.files import (
    Benchmark,
    answers_by_question,
    image_at,
    read_questions,
    write_images,
    write_json,
)

_QUERIES = ("prompt", "question", "instruction", "query")


def _query(record: Field, folder: ImageFolder) -> Document:
    name = next((key for key in _QUERIES if key in record), None)
    if name is None:
        record.wrong(f"one of {', '.join(_QUERIES)}")
    return Document(
        id=str(record["id"].value),
        parts=(*_given_images(record, folder), Text(record[name].text())),
        meta={"record": record.value},
    )


def _given_images(record: Field, folder: ImageFolder) -> list[Image]:
    """Those of `images`, or of `image`, a path or a list of them; null is none."""
    given = record.get("images") or record.get("image")
    if given is None or given.value is None:
        return []
    fields = given.list() if isinstance(given.value, list) else [given]
    return [image_at(field, folder) for field in fields]


def _asked_alone(record: Field, folder: ImageFolder) -> Document:
    """InterSyn's image is part of the gold answer."""
    answer, image = record.get("answer"), record.get("image")
    target: list[Part] = [] if answer is None or not answer.value else [Text(answer.text())]
    target += [] if image is None or not image.value else [image_at(image, folder)]
    question = Text(record["question"].text())
    return Document(
        id=str(record["id"].value), parts=(question,), target=tuple(target), meta={"record": record.value}
    )


def _write_ueval(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    def record(question: Document, text: str, names: list[str]) -> dict[str, Any]:
        return {"id": question.meta["record"]["id"], "text_answer": text, "image_answer": names}

    _write_list(answers, questions, out, record)


def _write_intersyn(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    def record(question: Document, text: str, names: list[str]) -> dict[str, Any]:
        return {**question.meta["record"], "answer": text, "image": names[0] if names else None}

    _write_list(answers, questions, out, record)


def _write_plain(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    def record(question: Document, text: str, names: list[str]) -> dict[str, Any]:
        return {"id": question.id, "text": text, "images": names}

    _write_list(answers, questions, out, record)


def _write_list(answers: Sequence[Document], questions: Sequence[Document], out: Path, record: Any) -> None:
    records = []
    for question, parts in answers_by_question(answers, questions):
        names = write_images(parts, out, lambda number, key=question.id: f"images/{key}_{number}.png")
        text = "\n".join(part.text for part in parts if isinstance(part, Text))
        records.append(record(question, text, names))
    write_json(out / "answers.json", records)


UEVAL = Benchmark(read=lambda path: read_questions(path, _query), write=_write_ueval)
INTERSYN = Benchmark(read=lambda path: read_questions(path, _asked_alone), write=_write_intersyn)
INTERLEAVED_BENCH = Benchmark(read=lambda path: read_questions(path, _query), write=_write_plain)
