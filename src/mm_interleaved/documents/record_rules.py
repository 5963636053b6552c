"""What holds for every record, whichever reader makes a document of it.

A reader gets a tracked record (`documents.strict_json.Field`). What it did not ask for is either content
(images, other media, questions, answers, instructions), and then the record is refused: part of it would be
lost in silence; or it is something else, and then the document carries a remark that is counted by name. So
do texts that hold markup for images that was no markup there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.placeholders import first_placeholder
from mm_interleaved.documents.strict_json import Field, FieldError, describe

_MEDIA = {
    *("image", "img", "picture", "pic", "photo", "photograph", "screenshot", "thumbnail", "drawing"),
    *("video", "clip", "movie", "gif", "frame", "audio", "sound", "speech", "voice", "media", "attachment"),
    *("pixel", "jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "mp4", "webm", "mov", "avi", "mkv"),
    *("mp3", "wav", "flac", "ogg", "m4a"),
}
_WORDING = {
    *("system", "instruction", "prompt", "question", "query", "answer", "response", "completion", "reply"),
    *("output", "solution", "rationale", "explanation", "message", "conversation", "dialog", "dialogue"),
    *("turn", "chat", "caption", "text", "sentence", "paragraph", "story", "content", "target", "chosen"),
    *("assistant", "human", "gpt", "user", "bot", "input", "txt", "hint", "choice", "tool"),
}
_CONTENT = _MEDIA | _WORDING
_OFTEN = ("image", "picture", "photo", "video", "audio", "prompt", "answer", "response", "instruction")
_FILE_WORDS = {"file", "filename", "filepath"}
_ADDED = {
    *("path", "file", "filename", "filepath", "list", "url", "uri", "link", "name", "byte", "base64", "b64"),
    *("data", "string", "str", "array", "content", "column", "value", "src"),
}
"""Words behind the one that counts: `image_path`, `audio_files`, `video_url`."""
_WORDS = re.compile(r"base64|b64|mp[34]|m4a|[A-Z]?[a-z]+|[A-Z]+(?![a-z])", re.ASCII)

AS_TEXT = "markup for images that matches no image, taken as text"
"""The remark on a document with such a text."""


def is_content_name(name: str) -> bool:
    """Whether a field of this name holds images, other media, questions, answers or instructions.

    >>> [is_content_name(name) for name in ("images", "videoPath", "gt_answers", "image_id", "url")]
    [True, True, True, False, False]
    """
    words = [word.lower().removesuffix("s") for word in _WORDS.findall(name)]
    kept = list(words)
    while len(kept) > 1 and kept[-1] in _ADDED:
        kept.pop()
    is_file = set(words) <= _ADDED and bool(_FILE_WORDS & set(words))
    return is_file or any(map(_is_content_word, (*kept[-1:], *words[-1:])))


def _is_content_word(word: str) -> bool:
    """Also of two words written as one: `imageurl`, `systemprompt`."""
    is_joined = word.endswith(_OFTEN) or any(
        word.startswith(begin) and word.removeprefix(begin) in _ADDED for begin in _OFTEN
    )
    return word in _CONTENT or is_joined


def carries_content(field: Field) -> bool:
    """Whether an unused field may carry what the document lacks: by its name, and as something was said."""
    name = field.path.rpartition(".")[2]
    # Numbers and truth values say something about content, such as how much of it there is.
    return not isinstance(field.value, bool | int | float) and is_content_name(name)


def finished(
    document: Document,
    place: str,
    records: Sequence[Field],
    *,
    known: Collection[str] = (),
    is_plain_text: bool = False,
) -> Document:
    """The document with its place and with remarks on what its records hold beside it.

    Args:
        records: the tracked fields that it was made from.
        known: names of fields that its reader leaves aside on purpose.
        is_plain_text: texts hold no markup, whatever they spell, as in our own form.

    Raises:
        FieldError: content that was not used.
    """
    others = [field for record in records for field in record.unused() if _name(field) not in known]
    contents = _contents(document)
    _refuse_content(field for field in others if not _repeats(field.value, contents))
    remarks = [f"unused field {name!r}" for name in dict.fromkeys(map(_shape, others))]
    parts = (*document.parts, *document.target)
    if not is_plain_text and any(first_placeholder(text) for text in _texts(parts)):
        remarks.append(AS_TEXT)
    return replace(document, place=place, remarks=(*document.remarks, *remarks))


def refuse_content_beside(table: Field, used: Collection[str]):
    """Raises FieldError where an object holds content in other fields than those that are used."""
    if isinstance(table.value, dict):
        _refuse_content(table[name] for name, value in table.value.items() if name not in used and value)


def _refuse_content(unused: Iterable[Field]):
    lost = next((field for field in unused if carries_content(field)), None)
    if lost is not None:
        raise FieldError(
            lost.path,
            f"found {describe(lost.value)}, which has no place in this form of record and would be lost",
        )


def _contents(document: Document) -> set[str]:
    """The texts of a document and the names of its images: a field that repeats them loses nothing."""
    parts = (*document.parts, *document.target)
    return {(part.text if isinstance(part, Text) else part.name or "").strip().casefold() for part in parts}


def _repeats(value: Any, contents: Collection[str]) -> bool:
    """Whether a value of JSON holds nothing but what the document has."""
    if isinstance(value, list):
        return all(_repeats(item, contents) for item in value)
    return isinstance(value, str) and value.strip().casefold() in contents


def reason_to_leave_out(document: Document) -> str | None:
    """The rule by which a document is of no use for training or scoring; None where it is.

    A blank answer teaches to say nothing, and a blank prompt asks for nothing.
    """
    if any(not text.strip() for text in _texts(document.target)):
        return "empty_target"
    if document.target:
        return None if any(_says_something(part) for part in document.parts) else "empty_prompt"
    texts = list(_texts(document.parts))
    answers = _answers(document)
    if any(not any(map(_says_something, answer)) for answer in answers):
        return "empty_answer"
    return "empty_text" if texts and not any(text.strip() for text in texts) else None


def _answers(document: Document) -> list[list[Part]]:
    """What the assistant says, turn by turn."""
    turns: list[list[Part]] = []
    before: str | None = None
    for part in document.parts:
        if part.role == "assistant":
            if before != "assistant":
                turns.append([])
            turns[-1].append(part)
        before = part.role
    return turns


def _says_something(part: Part) -> bool:
    return isinstance(part, Image) or bool(part.text.strip())


def _texts(parts: Sequence[Part]) -> Iterator[str]:
    return (part.text for part in parts if isinstance(part, Text))


def _name(field: Field) -> str:
    return field.path.rpartition(".")[2]


def _shape(field: Field) -> str:
    """The path without its indices: the same for all items of a list."""
    return re.sub(r"\[\d+\]", "[]", field.path)
