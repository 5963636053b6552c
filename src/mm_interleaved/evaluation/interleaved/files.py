"""What all benchmarks share: strict records, references to their images, and answers as files.

Parts in the form of several benchmarks are `{"text": ..., "image": ...}`, either of which may be null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.images import to_png
from mm_interleaved.documents.record_files import read_records
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answers import parts_of
from mm_interleaved.files import make_folder, write_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark."""

    read: Callable[[Path], list[Document]]
    """Its published file → documents; `meta["record"]` keeps the whole record for `write`."""
    write: Callable[[Sequence[Document], Sequence[Document], Path], None]
    """(answers, questions, folder): the files that its evaluator reads. A question without an answer is an
    answer without parts there."""


def read_questions(
    path: Path, build: Callable[[Field, ImageFolder], Document | list[Document]]
) -> list[Document]:
    """A document of each record of a `.jsonl`, or of a `.json` list, or several of it.

    Args:
        build: gets the record and the folder in which its images lie.

    Raises:
        InputError: names file, line and field of what is wrong; an id that occurs twice.
    """
    folder = ImageFolder(path.parent, path.parent)
    found: dict[str, Document] = {}
    for record in read_records(path):
        try:
            built = build(record.field, folder)
        except FieldError as error:
            raise error.at(record.place) from error
        for document in [built] if isinstance(built, Document) else built:
            if document.id in found:
                raise InputError(f"{record.place}: id {escape(document.id)!r} occurs twice", field="id")
            found[document.id] = document
    if not found:
        raise InputError(f"{path}: found no question")
    return list(found.values())


def paired_parts(entries: Field, folder: ImageFolder) -> tuple[Part, ...]:
    """The parts of `[{"text", "image"}]`, text before image in each entry; null and empty ones are none."""
    return tuple(part for entry in entries.list() for part in _parts_of_entry(entry, folder))


def _parts_of_entry(entry: Field, folder: ImageFolder) -> Iterator[Part]:
    text, image = entry.get("text"), entry.get("image")
    if text is not None and text.value is not None and text.text().strip():
        yield Text(text.text())
    if image is not None and image.value:
        yield image_at(image, folder)


def image_at(reference: Field, folder: ImageFolder) -> Image:
    """The image that a record names. Raises FieldError where it is not there."""
    image = folder.image(reference)
    assert image is not None, "the folder leaves out none"
    return image


def paired_entries(parts: Sequence[Part], name: Callable[[int], str]) -> list[dict[str, str | None]]:
    """Parts as `[{"text", "image"}]`: a text and the image that follows it share an entry.

    Args:
        name: the file name of an image, by its number from 1.
    """
    entries: list[dict[str, str | None]] = []
    number = 0
    for part in parts:
        if isinstance(part, Text):
            entries.append({"text": part.text, "image": None})
            continue
        number += 1
        if entries and entries[-1]["image"] is None and entries[-1]["text"] is not None:
            entries[-1]["image"] = name(number)
        else:
            entries.append({"text": None, "image": name(number)})
    return entries


def answers_by_question(
    answers: Sequence[Document], questions: Sequence[Document]
) -> Iterator[tuple[Document, tuple[Part, ...]]]:
    """Each question and the parts that answer it."""
    found = {answer.id: answer for answer in answers}
    for question in questions:
        yield question, parts_of(found.get(question.id))


def write_images(parts: Sequence[Part], folder: Path, name: Callable[[int], str]) -> list[str]:
    """Writes the images of an answer under the names of their numbers, from 1; returns the names."""
    images = [part for part in parts if isinstance(part, Image)]
    if images:
        make_folder(folder)
    names = []
    for number, image in enumerate(images, start=1):
        names.append(name(number))
        path = folder / names[-1]
        make_folder(path.parent)
        write_file(path, _encoded(image, path.suffix))
    return names


def write_json(path: Path, value: Any) -> None:
    make_folder(path.parent)
    write_file(
        path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace")
    )


def write_lines(path: Path, records: Sequence[Any]) -> None:
    make_folder(path.parent)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(path, lines.encode("utf-8", "backslashreplace"))


def _encoded(image: Image, suffix: str) -> bytes:
    if suffix == ".png":
        return to_png(image.load())
    from io import BytesIO

    buffer = BytesIO()
    image.load().convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
