"""OpenING (arXiv 2411.18499): 56 tasks of open-ended interleaved generation, judged on seven axes.

A line: `{"total_uid", ..., "conversations": [{"input": [{"text", "image"}]}, {"output": [...]}]}`. Nearly
half of its prompts have no image. Answers: `<total_uid>.json` of the same shape beside
`<total_uid>-o-<i>.jpg`.
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


def _question(record: Field, folder: ImageFolder) -> Document:
    asked, *answered = record["conversations"].list()
    return Document(
        id=record["total_uid"].text(),
        parts=paired_parts(asked["input"], folder),
        target=paired_parts(answered[0]["output"], folder) if answered else (),
        meta={"record": record.value},
    )


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    for question, parts in answers_by_question(answers, questions):
        record = question.meta["record"]
        write_images(parts, out, lambda number, uid=question.id: f"{uid}-o-{number - 1}.jpg")
        entries = paired_entries(parts, lambda number, uid=question.id: f"./{uid}-o-{number - 1}.jpg")
        conversations = [record["conversations"][0], {"output": entries}]
        write_json(out / f"{question.id}.json", {**record, "conversations": conversations})


OPENING = Benchmark(read=lambda path: read_questions(path, _question), write=_write)
