"""ViStoryBench (arXiv 2505.24862): stories in shots with reference images of their characters.

A folder a story with `story.json`: `{"Shots": [{"index", "Plot Correspondence", "Setting Description",
"Shot Perspective Design", "Characters Appearing": {"en": [...]}, "Static Shot Description"}], "Characters":
{...}}`, and `image/<character>/*.jpg`. Answers, one image a shot, as its `load_outputs` looks for them in an
outputs root: `<method>/<mode>/<language>/<time>/<story>/shots/shot_<number>.png`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.record_files import read_records
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.interleaved.files import Benchmark, answers_by_question, write_images

_WORDS = (
    "Setting Description", "Plot Correspondence", "Static Shot Description", "Shot Perspective Design",
)  # fmt: skip
METHOD, MODE, LANGUAGE, TIME = "mm-interleaved", "full", "en", "20260101-000000"
"""Its evaluator wants a time in the path; ours is always the same, so that a run can be compared."""
_IMAGES = ("*.jpg", "*.jpeg", "*.png")


def read(path: Path) -> list[Document]:
    """The stories of a folder of stories, or of one story's folder: a document each.

    A document has the characters (name and first reference image), then the shots' texts; wanted is an image
    behind each shot, which is what its layout says.
    """
    files = [path / "story.json"] if (path / "story.json").is_file() else sorted(path.glob("*/story.json"))
    if not files:
        raise InputError(f"{escape(str(path))}: found no story.json, there or one folder below")
    return [_story(file) for file in files]


def _story(file: Path) -> Document:
    records = list(read_records(file))
    if len(records) != 1:
        raise InputError(f"{file}: found a list of {len(records)} records, expected one story")
    [record] = records
    try:
        shots = record.field["Shots"].list()
        if not shots:
            record.field["Shots"].wrong("at least one shot")
        cast = [part for name in _cast(shots) for part in _character(file.parent, name)]
        parts = (*cast, Text("\n".join(_words(shot) for shot in shots)))
    except FieldError as error:
        raise error.at(str(file)) from error
    return Document(
        id=file.parent.name, parts=parts, layout=" ".join("I" for _ in shots), meta={"shots": len(shots)}
    )


def _cast(shots: Sequence[Field]) -> list[str]:
    """Everybody who appears, in the order of appearance."""
    names = []
    for shot in shots:
        appearing = shot["Characters Appearing"]
        names += [name.text() for name in _english(appearing).list()]
    return list(dict.fromkeys(names))


def _english(entry: Field) -> Field:
    """What is given in several languages, or in one."""
    return entry["en"] if isinstance(entry.value, dict) else entry


def _character(folder: Path, name: str) -> list[Part]:
    images = [file for pattern in _IMAGES for file in sorted((folder / "image" / name).glob(pattern))]
    return [Text(f"{name}:"), *([Image(images[0], name=str(images[0]))] if images else [])]


def _words(shot: Field) -> str:
    found = []
    for key in _WORDS:
        entry = shot.get(key)
        if entry is not None and entry.value:
            found.append(_english(entry).text().strip())
    return " ".join(found)


def write(answers: Sequence[Document], questions: Sequence[Document], out: Path) -> None:
    """One image a shot, in order."""
    for question, parts in answers_by_question(answers, questions):
        story = re.sub(r"[^\w.-]", "_", question.id)
        folder = out / METHOD / MODE / LANGUAGE / TIME / story / "shots"
        write_images(parts, folder, lambda number: f"shot_{number:02d}.png")


VISTORY_BENCH = Benchmark(read=read, write=write)
