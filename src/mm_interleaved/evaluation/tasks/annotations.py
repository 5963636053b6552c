"""Gold documents out of the published annotation files: found by the names that they are published under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.data.registry import make_source
from mm_interleaved.data.source import BrokenItem, FilteredItem, items_of, shards_of
from mm_interleaved.data.storage.image_stores import first_image, image_store
from mm_interleaved.data.storage.records import whole_table
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.record_files import Record, decoded
from mm_interleaved.documents.strict_json import Field, parse_strict
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.tokens.task_prompts import PROMPTS

_FOLDERS = ("", "annotations/")
_ASKED_FOR = "other_split"
"""The rule by which settings choose among items; whatever else is left out is missing."""


def annotation_file(data: Path, names: Sequence[str]) -> Path:
    """The first file of these names in a folder or in its `annotations`; `data` itself where it is a file.

    Raises:
        InputError: there is none; says which were looked for.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise InputError(f"{escape(str(data))}: there is no such file or folder")
    for name in names:
        for folder in _FOLDERS:
            found = sorted(data.glob(folder + name))
            if found:
                return found[0]
    raise InputError(f"{escape(str(data))}: found none of {', '.join(names)}, there or in annotations/")


def has_annotation_file(data: Path, names: Sequence[str]) -> bool:
    """Whether there is one of these files beside others of a data set."""
    return data.is_dir() and any(any(data.glob(folder + name)) for name in names for folder in _FOLDERS)


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines, whatever it is called (POPE's are called `.json`)."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                text = decoded(line, place, is_start=number == 1)
                if text.strip():
                    yield Record(place, number, Field(parse_strict(text, place, first_line=None)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def question_about(
    options: TaskOptions,
    path: Path,
    record: Field,
    name: str,
    question: str,
    target: tuple[Text, ...],
    meta: Mapping[str, Any],
) -> Document:
    """A question about the image that a record names, in `image`, `imageId` or `data_id`.

    Raises:
        FieldError: the record has none of them, or the image is not there.
    """
    prompt = PROMPTS[options.prompt or "question"]
    key = next((key for key in ("image", "imageId", "data_id") if key in record), "image")
    names = [record[key].text()]
    names += [f"{names[0]}.jpg"] if "." not in names[0] else []
    store = image_store(options.source.get("images"), str(path), skip_missing=True)
    image = first_image(store, names, record[key].path, prompt.role)
    return Document(id=name, parts=prompt.parts(image, question), target=target, layout="T", meta=meta)


def each_once(path: Path, documents: Sequence[Document]) -> list[Document]:
    """The documents, of which there are some, each with an id of its own. Raises InputError where not."""
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise InputError(f"{path}: id {escape(document.id)!r} occurs twice", field="id")
        seen.add(document.id)
    if not documents:
        raise InputError(f"{path}: found nothing to evaluate")
    return list(documents)


def identity(field: Field) -> str:
    """An id, a number or a string."""
    value = field.value
    is_id = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value) if is_id else field.wrong("a number or a string")


def gold_documents(kind: str, settings: Mapping[str, Any]) -> list[Document]:
    """All documents of a source that its settings ask for.

    Args:
        kind, settings: see `data.registry.make_source`.

    Raises:
        InputError: an item is broken or empty, files are missing, an id occurs twice, or nothing is left.
            What is evaluated is whole or not at all: a score over fewer items compares with nobody's.
    """
    source = make_source(kind, settings)
    documents: dict[str, Document] = {}
    for shard in shards_of(source):
        for _, item in items_of(source, shard):
            if isinstance(item, BrokenItem):
                raise InputError(str(item), field=item.field)
            if isinstance(item, FilteredItem):
                if item.rule != _ASKED_FOR:
                    raise InputError(f"{item.place}: cannot be evaluated ({item.rule.replace('_', ' ')})")
                continue
            if item.id in documents:
                raise InputError(f"{shard.name}: id {escape(item.id)!r} occurs twice", field="id")
            documents[item.id] = item
    if not documents:
        raise InputError(f"{settings.get('paths')}: found nothing to evaluate")
    return list(documents.values())


def refuse_doubled_ids(path: Path, *lists: str) -> None:
    """Refuses a table in which one of these lists has two entries of the same `id`: both would be counted.

    Args:
        lists: of the table's fields; those that it has not, or that are none, are left to whoever reads them.
    """
    table = whole_table(str(path))
    for entries in map(table.get, lists) if isinstance(table.value, dict) else ():
        if entries is not None and isinstance(entries.value, list):
            _refuse_doubled(path, entries)


def _refuse_doubled(path: Path, entries: Field) -> None:
    seen: dict[str, str] = {}
    for entry in entries.list():
        value = entry.get("id") if isinstance(entry.value, dict) else None
        if value is None or not isinstance(value.value, int | str):
            continue
        place, name = f"{entry.path}.id".lstrip("."), str(value.value)
        if name in seen:
            raise InputError(
                f"{path}: {place}: {escape(name)!r} occurs twice, first at {seen[name]}", field=place
            )
        seen[name] = place
