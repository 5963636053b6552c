"""Our own form (`content`), OpenAI's and transformers' `messages`, and TRL's `prompt` and `completion`."""

from __future__ import annotations

from mm_interleaved.documents.document import Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.placeholders import PartOrSlot
from mm_interleaved.documents.record_parts import Body, content_pieces, joined, without_slots
from mm_interleaved.documents.strict_json import Field


def read_content(record: Field, folder: ImageStore) -> Body:
    """Our own form: `content`, a list of parts."""
    return Body(joined(record, content_pieces(record["content"], folder), folder))


def read_messages(record: Field, folder: ImageStore) -> Body:
    """A conversation: `messages`, each with `role` and `content`."""
    return Body(joined(record, _message_pieces(record["messages"], folder), folder))


def read_completion(record: Field, folder: ImageStore) -> Body:
    """TRL's `prompt` and `completion`: texts, or messages. The completion is the target."""
    prompt, completion = (_text_or_messages(record[name], folder) for name in ("prompt", "completion"))
    return Body(joined(record, prompt, folder), target=without_slots(completion))


def _text_or_messages(given: Field, folder: ImageStore) -> list[PartOrSlot]:
    return [Text(given.text())] if isinstance(given.value, str) else _message_pieces(given, folder)


def _message_pieces(messages: Field, folder: ImageStore) -> list[PartOrSlot]:
    pieces: list[PartOrSlot] = []
    for message in messages.list():
        role = message["role"].text()
        if not role or not role.isprintable():
            message["role"].wrong("a name such as user or assistant")
        pieces += content_pieces(message["content"], folder, role)
    return pieces
