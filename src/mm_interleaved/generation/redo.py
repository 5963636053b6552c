"""One part of a document made again, and what comes after it kept or made again too.

    document, part K -> the document before K -> the engine -> a new part K -> the later parts

Nothing is special about a part that is made again: it is what the engine generates as the next part of the
document before it. Its seed comes from that of the settings and its place: the same seed makes the same part.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import groupby

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.documents.layout import AUTO, IMAGE, TEXT
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.continuation import text_share
from mm_interleaved.generation.events import Event, Finished
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.spelling import guess
from mm_interleaved.tokens.conversation_format import ANSWERING_ROLE
from mm_interleaved.tokens.processor import MMInterleavedProcessor

KEEP, AGAIN = "keep", "again"
RESTS = (KEEP, AGAIN, AUTO)
"""What becomes of the parts after the one that is made again: they are kept; those that were generated are
generated again, in the same order of kinds, and those that were given stay; or all of them go, and the model
decides how to go on.
"""

Stream = Callable[[Document, GenerationSettings], Iterator[Event]]
"""The engine: continues a document by complete settings."""


def check_redo(document: Document, part: int, rest: str = KEEP) -> None:
    """Refuse what cannot be made again.

    Raises:
        UsageError: there is no such part, it is somebody else's in a conversation, or `rest` is none of
            `RESTS`.
    """
    document.edited(part, "")
    if rest not in RESTS:
        raise UsageError(
            f"rest: expected {', '.join(RESTS)}, found {escape(repr(rest))}{guess(rest, RESTS)}", field="rest"
        )
    role = document.parts[part].role
    if role not in (None, ANSWERING_ROLE):
        raise UsageError(
            f"document {escape(document.id)!r}: part {part} is what {escape(repr(role))} says, expected one "
            f"of {ANSWERING_ROLE!r}",
            field="part",
        )


def stream_again(
    stream: Stream,
    processor: MMInterleavedProcessor,
    context_length: int,
    document: Document,
    part: int,
    settings: GenerationSettings,
    rest: str = KEEP,
) -> Iterator[Event]:
    """The events of one part made again, and of those after it where they are; `Finished` with the whole
    document at the end.

    Args:
        context_length: tokens that the model takes.
        part: index among the document's parts.
        settings: complete; their `layout` is that of the document as a whole, and does not count here.
        rest: see `RESTS`.

    Raises:
        UsageError: see `check_redo`; or a text that is made again has no room beside the parts that are kept.
    """
    check_redo(document, part, rest)
    room = _TextRoom(processor, context_length, settings.max_new_tokens)
    before, old = document.branched(part), document.parts[part]
    if rest == AUTO:
        limit = room.left_after(before)
        yield from _ending(document, stream(before, _with(settings, AUTO, limit)))
        return
    if rest == KEEP:
        layout, limit = _letter(old), room.left_beside(document, part, settings.layout)
        new = yield from _passed_on(stream(before, _with(settings, layout, limit)))
        again = new.document.parts[part:]
        parts = (
            *before.parts,
            *(replace(each, role=old.role) for each in again),
            *document.parts[part + 1 :],
        )
        yield Finished(new.reason, replace(document, parts=parts))
        return
    yield from _all_again(stream, room, document, part, settings)


def _all_again(
    stream: Stream, room: "_TextRoom", document: Document, part: int, settings: GenerationSettings
) -> Iterator[Event]:
    """The part and all generated ones after it, run by run; what was given between them stands as it did."""
    now, reason = document.branched(part), "layout"
    later = list(enumerate(document.parts[part:]))
    for is_made, run in groupby(later, key=lambda item: item[0] == 0 or item[1].generated):
        parts = [each for _, each in run]
        if not is_made:
            now = now.extended(*parts)
            continue
        layout = " ".join(map(_letter, parts))
        done = yield from _passed_on(stream(now, _with(settings, layout, room.left_after(now))))
        made = done.document.parts[len(now.parts) :]
        roles = [each.role for each in parts]
        now = now.extended(*(replace(new, role=role) for new, role in zip(made, roles, strict=False)))
        reason = done.reason
        if len(made) < len(parts):
            break
    yield Finished(reason, replace(document, parts=now.parts))


def another_seed(seed: int, attempt: int) -> int:
    """A seed for one more attempt at something that was made with `seed`: the same for the same attempt."""
    digest = hashlib.sha256(f"{seed}:again:{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class _TextRoom:
    """How many tokens of text a document may still get, as if it had been generated in one go."""

    def __init__(self, processor: MMInterleavedProcessor, context_length: int, max_new_tokens: int):
        self.processor, self.context_length, self.budget = processor, context_length, max_new_tokens

    def left_after(self, before: Document) -> int:
        """What is left of the budget behind these parts; at least a token for each text that is wanted, which
        the engine sees to.
        """
        encode = self.processor.vocabulary.encode_text
        texts = (part.text for part in before.parts if isinstance(part, Text) and part.generated)
        return max(1, self.budget - sum(len(encode(text)) for text in texts))

    def left_beside(self, document: Document, part: int, layout: str) -> int:
        """The same, where the parts after it are to stay: so that all of them still fit the context; and
        where the layout was given, which shares what there is, the part's share of it.
        """
        before = document.branched(part)
        left = self.left_after(before)
        if not isinstance(document.parts[part], Text):
            return left
        others = self._num_tokens(document.without(part))
        if others >= self.context_length:
            raise UsageError(
                f"document {escape(document.id)!r}: the parts beside part {part} have {others} tokens of "
                f"{self.context_length}, which leaves it no room",
                field="part",
            )
        if layout != AUTO:
            later = [TEXT, *(_letter(each) for each in document.parts[part + 1 :] if each.generated)]
            room = self.context_length - self._num_tokens(before)
            left = text_share(later, left, room, 1 + self.processor.vocabulary.num_slots)
        return min(left, self.context_length - others)

    def _num_tokens(self, document: Document) -> int:
        return len(self.processor.encode(document).input_ids)


def _with(settings: GenerationSettings, layout: str, max_new_tokens: int) -> GenerationSettings:
    texts = 1 if layout == AUTO else layout.count(TEXT)
    limit = max(max_new_tokens, texts)
    changed = {"layout": layout, "max_new_tokens": limit}
    changed["min_new_tokens"] = min(settings.min_new_tokens, limit)
    return GenerationSettings.combine(settings.to_dict(), changed)


def _letter(part: Part) -> str:
    return TEXT if isinstance(part, Text) else IMAGE


def _passed_on(events: Iterator[Event]) -> Generator[Event, None, Finished]:
    """Passes events on but for the last, which is returned."""
    for event in events:
        if isinstance(event, Finished):
            return event
        yield event
    raise AssertionError("a stream ends with Finished")


def _ending(document: Document, events: Iterator[Event]) -> Iterator[Event]:
    """Passes events on; the completed document has all that the former one had besides its parts."""
    for event in events:
        if isinstance(event, Finished):
            event = Finished(event.reason, replace(document, parts=event.document.parts))
        yield event
