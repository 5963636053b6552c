"""Every form of record that is read: a record is recognised by its fields, and its form's reader is called.

A new form is a reader in `forms/` and a line in `FORMATS` here. A wrong field is an InputError with file,
line and field, never a document that means something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.documents.forms.annotations import read_annotation
from mm_interleaved.documents.forms.comm import read_comm
from mm_interleaved.documents.forms.llava import read_llava
from mm_interleaved.documents.forms.messages import read_completion, read_content, read_messages
from mm_interleaved.documents.forms.mmc4 import read_mmc4
from mm_interleaved.documents.forms.obelics import read_obelics
from mm_interleaved.documents.forms.pairs import read_captions, read_pair
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.layout import EXPECTED, canonical_layout
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.record_parts import IMAGES_BESIDE, Body, content_parts
from mm_interleaved.documents.record_rules import finished
from mm_interleaved.documents.session_files import FORMAT as SESSION
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import UsageError, escape

MAX_ID = 200
_COMMON = ("id", "layout", "generation", "meta", "target")


@dataclass(frozen=True, slots=True)
class Format:
    """A form of record: the fields it is known by, and its reader, which asks for all that it uses."""

    known_by: tuple[str, ...]
    read: Callable[[Field, ImageStore], Body]
    known: tuple[str, ...] = ()
    """Further fields, of no use here."""
    is_plain_text: bool = False
    """Texts hold no markup, whatever they spell."""


_SIMILARITY = ("matched_sim", "raw_url", "image_url", "url", "face_detections")
FORMATS = (
    Format(("messages",), read_messages, is_plain_text=True),
    Format(("content",), read_content, is_plain_text=True),
    Format(("prompt", "completion"), read_completion, is_plain_text=True),
    Format(("sentences", "images", "sentence_ixs", "image_first"), read_annotation),
    Format(("text_list", "image_info"), read_mmc4, known=_SIMILARITY),
    Format(("conversations",), read_llava),
    Format(("model_input",), read_comm, known=("prediction_image_list", "prediction_text")),
    Format(("images", "texts"), read_obelics, known=("metadata", "general_metadata")),
    Format(("images", "captions"), read_captions),
    Format(("file_name",), read_pair),
    Format(("text",), read_pair, known=("image_url", "url")),
    Format(("image",), read_pair, known=("image_url", "url")),
)
"""The first whose fields are all there is taken."""


def read_record(record: Record, folder: ImageStore) -> Document:
    """The document of one record, whichever of the known forms it has.

    Raises InputError: a wrong field, or one that carries content and is not used.
    """
    try:
        return _read(replace(record, field=record.field.tracked()), folder)
    except FieldError as error:
        raise error.at(record.place) from error


def _read(line: Record, folder: ImageStore) -> Document:
    record = line.field
    fields = record.object()
    found = next((form for form in FORMATS if all(name in fields for name in form.known_by)), None)
    if found is None:
        expected = ", ".join("+".join(form.known_by) for form in FORMATS)
        names = ", ".join(escape(name, 40) for name in fields) or "none"
        raise FieldError(record.path, f"found the fields {names}, expected those of a document ({expected})")
    # 1. Parts by the reader of the form, 2. what all forms have, 3. what holds for every record.
    _check_spelling(record, found.known_by)
    body = found.read(record, folder)
    _pass_over_session(record)
    given_target = record.get("target")
    document = Document(
        id=_id(record, line.number),
        parts=tuple(body.parts),
        target=tuple(body.target if given_target is None else content_parts(given_target, folder)),
        layout=_layout(record) or body.layout,
        generation=_mapping(record, "generation"),
        meta={**_other_fields(record), **body.meta, **_mapping(record, "meta")},
    )
    if not any(isinstance(part, Image) or part.text.strip() for part in document.parts):
        raise FieldError(record.path, "found an empty document, expected at least one text or image")
    is_plain_text = found.is_plain_text and not any(name in record for name in IMAGES_BESIDE)
    return finished(document, line.place, [record], known=found.known, is_plain_text=is_plain_text)


def _pass_over_session(record: Field):
    """What else a session held (`documents.session_files`) is neither the document's content nor its meta."""
    session = record.get("session")
    if session is not None and isinstance(session.value, dict) and session.value.get("format") == SESSION:
        session.whole()


def _id(record: Field, number: int) -> str:
    given = record.get("id")
    if given is None:
        content = json.dumps(record.value, sort_keys=True).encode()
        return f"line{number}-{hashlib.sha256(content).hexdigest()[:8]}"
    if isinstance(given.value, int) and not isinstance(given.value, bool):
        return str(given.value)
    text = given.text()
    if not 0 < len(text) <= MAX_ID or not text.isprintable():
        given.wrong(f"1 to {MAX_ID} printable characters")
    return text


def _layout(record: Field) -> str | None:
    given = record.get("layout")
    if given is None:
        return None
    try:
        return canonical_layout(given.text())
    except UsageError:
        given.wrong(EXPECTED.removeprefix("expected "))


def _mapping(record: Field, name: str) -> dict[str, Any]:
    given = record.get(name)
    if given is None:
        return {}
    given.object()
    return dict(given.whole())


def _other_fields(record: Field) -> dict[str, Any]:
    """Fields that mean nothing here and are carried along."""
    used = record.used or {}
    return {name: value for name, value in record.value.items() if name not in (*_COMMON, *used)}


def _check_spelling(record: Field, known: Sequence[str]):
    """Refuses a field that looks like a misspelt one of all documents."""
    # `targets` would be carried along like any unknown field, and the document would lose its answer.
    for name in record.object():
        close = get_close_matches(name, [k for k in _COMMON if k not in record], n=1, cutoff=0.8)
        if close and name not in (*_COMMON, *known):
            raise FieldError(record[name].path, f"there is no such field, did you mean {close[0]!r}?")
