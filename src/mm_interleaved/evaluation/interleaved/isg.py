"""ISG-Bench (arXiv 2411.17188): structure and relations of interleaved answers, of which structure needs no
judge.

A line: `{"id", "Category", "Query": [{"type", "content"}], "Golden": [...], "predict": {"structural":
[...], ...}}`. Answers: `output.jsonl`, the same lines with `"output": [{"type", "content"}]`, beside
`images/`. Its evaluator (`ISG-eval.py`) reads `Query` and `Golden` there and looks for relative paths in the
benchmark's own folder, so those of answers are absolute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.evaluation.interleaved.files import (
    Benchmark,
    answers_by_question,
    image_at,
    read_questions,
    write_images,
    write_lines,
)


def _question(record: Field, folder: ImageFolder) -> Document:
    golden = record.get("Golden")
    return Document(
        id=str(record["id"].value),
        parts=_parts(record["Query"], folder),
        target=() if golden is None else _parts(golden, folder),
        meta={"record": record.value},
    )


def _parts(entries: Field, folder: ImageFolder) -> tuple[Part, ...]:
    parts: list[Part] = []
    for entry in entries.list():
        kind = entry["type"].text()
        if kind == "text":
            parts.append(Text(entry["content"].text()))
        elif kind == "image":
            parts.append(image_at(entry["content"], folder))
        else:
            entry["type"].wrong("text or image")
    return tuple(parts)


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    lines = []
    for question, parts in answers_by_question(answers, questions):
        names = iter(write_images(parts, out, lambda number, key=question.id: f"images/{key}_{number}.png"))
        output = [
            {"type": "text", "content": part.text}
            if isinstance(part, Text)
            else {"type": "image", "content": str((out / next(names)).absolute())}
            for part in parts
        ]
        lines.append({**question.meta["record"], "output": output})
    write_lines(out / "output.jsonl", lines)


ISG_BENCH = Benchmark(read=lambda path: read_questions(path, _question), write=_write)
