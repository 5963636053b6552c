"""WEAVEBench (arXiv 2511.11434): dialogues that edit and ask about images, each turn a question.

A list of `{"domain", "images": [paths], "chats": [{"role", "type", "content"}]}`, user and assistant in turn;
`Image #n` in a content stands for the n-th of `images`. An assistant's turn of type `image` has such a name
alone, one of type `text` an answer. A document a question: the dialogue before it, its gold answers included,
then the user's turn. Answers, as its evaluator looks for them: an image under the path of the one that was
wanted, a text under that of the record's first image, `<stem>_<turn>.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.evaluation.interleaved.files import (
    Benchmark,
    answers_by_question,
    image_at,
    read_questions,
    write_images,
)
from mm_interleaved.files import make_folder, write_file

_REFERENCE = re.compile(r"Image #(\d+)")
_ROLES = ("user", "assistant")


class _Turn(NamedTuple):
    parts: list[Part]
    wants_image: bool
    first_named: str | None
    """The path of the first image that it names."""


def _questions(record: Field, folder: ImageFolder) -> list[Document]:
    images, chats = record["images"].list(), record["chats"].list()
    if not chats:
        record["chats"].wrong("at least one turn")
    name = record.get("id")
    key = f"{record['domain'].text()}-{record.path or 'record'}" if name is None else str(name.value)
    turns = [_turn(chat, number, images, folder) for number, chat in enumerate(chats)]
    paths = [image.text() for image in images]
    documents: list[Document] = []
    for number in range(0, len(turns), 2):
        answer = turns[number + 1] if number + 1 < len(turns) else None
        wants_image = answer is None or answer.wants_image
        file = _name_within(answer.first_named) if answer is not None and wants_image else None
        if not wants_image and paths and (first := _name_within(paths[0])) is not None:
            file = f"{PurePosixPath(first).with_suffix('')}_{number // 2}.txt"
        documents.append(
            Document(
                id=key if len(turns) <= 2 else f"{key}-{number // 2}",
                parts=tuple(part for turn in turns[: number + 1] for part in turn.parts),
                target=() if answer is None else tuple(answer.parts),
                layout="I" if wants_image else "T",
                meta={"record": record.value, "file": file},
            )
        )
    return documents


def _name_within(path: str | None) -> str | None:
    """A path under which an answer may be written: one that leads out of its folder is none."""
    is_name = path is not None and not path.startswith("data:")
    parts = PurePosixPath(path).parts if path is not None and is_name else ()
    return path if parts and parts[0] != "/" and ".." not in parts else None


def _turn(chat: Field, number: int, images: Sequence[Field], folder: ImageFolder) -> _Turn:
    expected = _ROLES[number % 2]
    content, kind = chat, None
    if not isinstance(chat.value, str):
        content, kind = chat["content"], chat.get("type")
        role = chat.get("role")
        if role is not None and role.value != expected:
            role.wrong(f"{expected}: user and assistant speak in turn")
    parts, named = _with_images(content, images, folder)
    wants_image = kind is not None and kind.value == "image"
    return _Turn([replace(part, role=expected) for part in parts], wants_image, named)


def _with_images(text: Field, images: Sequence[Field], folder: ImageFolder) -> tuple[list[Part], str | None]:
    """`Image #n` in a text stands for an image, which is put where it is named."""
    found: list[Part] = []
    first: str | None = None
    position = 0
    for match in _REFERENCE.finditer(text.text()):
        number = int(match[1])
        if not 1 <= number <= len(images):
            text.wrong(f"Image #1 to #{len(images)}")
        before = text.text()[position : match.start()].strip()
        found += [*([Text(before)] if before else []), image_at(images[number - 1], folder)]
        first = first or images[number - 1].text()
        position = match.end()
    rest = text.text()[position:].strip()
    return [*found, *([Text(rest)] if rest else [])], first


def _write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    for question, parts in answers_by_question(answers, questions):
        suffix = ".png" if question.layout == "I" else ".txt"
        wanted = question.meta["file"] or re.sub(r"[^\w.-]", "_", question.id) + suffix
        if question.layout == "I":
            images = [part for part in parts if isinstance(part, Image)][:1]
            write_images(images, out, lambda _, wanted=wanted: wanted)
        else:
            text = "\n".join(part.text.strip() for part in parts if isinstance(part, Text))
            make_folder((out / wanted).parent)
            write_file(out / wanted, text.encode("utf-8", "backslashreplace"))


WEAVE = Benchmark(read=lambda path: read_questions(path, _questions), write=_write)
