"""CoMM (arXiv 2406.10462): four tasks between texts and images in steps.

A record (a line, or `results.json` in a folder a sample): `{"id"?, "model_input", "input_image_list",
"model_output"?, "output_gt_image_list"?}`, where `<IMAGE>` in a text stands for the next image of its list.
Answers: `<id>/results.json` with `model_output` ("(1) ... <IMAGE> (2) ...") and `prediction_image_list`.
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
    read_questions,
    write_images,
    write_json,
)

MARKUP = "<IMAGE>"


def _question(record: Field, folder: ImageFolder) -> Document:
    name = record.get("id")
    has_gold = "model_output" in record and "output_gt_image_list" in record
    return Document(
        id="sample" if name is None else str(name.value),
        parts=_parts(record["model_input"], record["input_image_list"], folder),
        target=_parts(record["model_output"], record["output_gt_image_list"], folder) if has_gold else (),
        meta={"record": record.value},
    )


def _parts(text: Field, images: Field, folder: ImageFolder) -> tuple[Part, ...]:
    pieces, names = text.text().split(MARKUP), images.list()
    if len(pieces) - 1 not in (0, len(names)):
        text.wrong(f"{MARKUP} as often as there are images in {images.path} ({len(names)})")
    if len(pieces) == 1:
        # No place is named: the images stand before the text.
        return (*(image_at(one, folder) for one in names), *_texts(pieces[0]))
    found: list[Part] = []
    for number, piece in enumerate(pieces):
        found += [*_texts(piece)]
        found += [image_at(names[number], folder)] if number < len(names) else []
    return tuple(found)


def _texts(piece: str) -> Iterator[Text]:
    if piece.strip():
        yield Text(piece.strip())


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    for question, parts in answers_by_question(answers, questions):
        folder = out / question.id
        names = write_images(parts, folder, lambda number: f"{number}.png")
        record = {**question.meta["record"], "model_output": steps(parts), "prediction_image_list": names}
        write_json(folder / "results.json", record)


def steps(parts: Sequence[Part]) -> str:
    """An answer as numbered steps: a step is a text and the images behind it."""
    pieces: list[str] = []
    number = 0
    for part in parts:
        if isinstance(part, Text):
            number += 1
            pieces.append(f"({number}) {part.text.strip()}")
        else:
            pieces.append(MARKUP)
    return " ".join(pieces)


COMM = Benchmark(read=lambda path: read_questions(path, _question), write=_write)
