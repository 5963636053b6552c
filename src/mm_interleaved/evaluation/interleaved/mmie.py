"""MMIE (arXiv 2410.10139): situational analysis, project-based learning and multi-step reasoning.

A list of `{"id", "question": [{"text", "image"}], "answer": [...], "model", "gt_answer": [...]}`. Answers:
the same list with `answer` and `model` filled in, beside `images/`; its judge is a model of its own. It looks
for relative paths in the benchmark's own folder, so those of answers are absolute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.evaluation.interleaved.files import (
    Benchmark,
    answers_by_question,
    paired_entries,
    paired_parts,
    read_questions,
    write_images,
    write_json,
)

MODEL_NAME = "mm-interleaved"


def _question(record: Field, folder: ImageFolder) -> Document:
    gold = record.get("gt_answer")
    return Document(
        id=str(record["id"].value),
        parts=paired_parts(record["question"], folder),
        target=() if gold is None else paired_parts(gold, folder),
        meta={"record": record.value},
    )


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    records = []
    for question, parts in answers_by_question(answers, questions):

        def name(number: int, key: str = question.id) -> str:
            return f"images/{key}_{number}.png"

        write_images(parts, out, name)
        entries = paired_entries(parts, lambda number, name=name: str((out / name(number)).absolute()))
        records.append({**question.meta["record"], "answer": entries, "model": MODEL_NAME})
    write_json(out / "answers.json", records)


MMIE = Benchmark(read=lambda path: read_questions(path, _question), write=_write)
