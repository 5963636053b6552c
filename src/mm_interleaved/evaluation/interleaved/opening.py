"""OpenING (arXiv 2411.18499): 56 tasks of open-ended interleaved generation, judged on seven axes.

A line: `{"total_uid", ..., "conversations": [{"input": [{"text", "image"}]}, {"output": [...]}]}`. Nearly
half of its prompts have no image. Answers: `<total_uid>.json` of the same shape beside
`<total_uid>-o-<i>.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.evaluation.interleaved.files import (
    Benchmark,
    answers_by_question,
    image_at,
    paired_entries,
    paired_parts,
    read_questions,
    write_images,
    write_json,
)

_BEGIN, _MARK = "<BEGIN>", "<image>"


def _question(record: Field, folder: ImageFolder) -> Document:
    if not (turns := record["conversations"].list()):
        record["conversations"].wrong("at least one turn")
    asked, *answered = turns
    return Document(
        id=record["total_uid"].text(),
        parts=tuple(_asked_parts(asked["input"], folder)),
        target=paired_parts(answered[0]["output"], folder) if answered else (),
        meta={"record": record.value},
    )


def _asked_parts(entries: Field, folder: ImageFolder) -> Iterator[Part]:
    """The parts of a question, whose texts begin with `<BEGIN>` and have `<image>` where their image stands,
    which its evaluator takes out; without such a mark the image follows.
    """
    for entry in entries.list():
        text, image = entry.get("text"), entry.get("image")
        words = "" if text is None or text.value is None else text.text()
        picture = image_at(image, folder) if image is not None and image.value else None
        words = words.strip().removeprefix(_BEGIN)
        is_marked = picture is not None and words.count(_MARK) == 1
        before, _, after = words.partition(_MARK) if is_marked else (words, "", "")
        yield from (Text(before.strip()),) if before.strip() else ()
        yield from (picture,) if picture is not None else ()
        yield from (Text(after.strip()),) if after.strip() else ()


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    for question, parts in answers_by_question(answers, questions):
        record = question.meta["record"]
        write_images(parts, out, lambda number, uid=question.id: f"{uid}-o-{number - 1}.jpg")
        entries = paired_entries(parts, lambda number, uid=question.id: f"./{uid}-o-{number - 1}.jpg")
        for entry in entries:
            # Its judges take every text for a string.
            entry["text"] = entry["text"] or ""
        conversations = [record["conversations"][0], {"output": entries}]
        write_json(out / f"{question.id}.json", {**record, "conversations": conversations})


OPENING = Benchmark(read=lambda path: read_questions(path, _question), write=_write)
