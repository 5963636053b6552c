"""What a person does to a document without the model: pure functions from session to session.

    apply(session, "edit", {"index": 1, "text": "It is old."}) -> another session

The page sends a name of `ACTIONS` and its fields. Nothing is overwritten: each action adds a path to the
session's tree, or shows another one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.layout import canonical_layout
from mm_interleaved.documents.part_tree import ROOT
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.spelling import unknown_name

Fields = Mapping[str, Any]
TITLE = "title"
MAX_TITLE = 200


def apply(session: Session, name: str, fields: Fields) -> Session:
    """The session after an action.

    Args:
        name: one of `ACTIONS`.
        fields: what the action needs; images are `Image` already.

    Raises:
        UsageError: no such action, a field that is missing or of another kind, a part that is not there.
    """
    if name not in ACTIONS:
        raise UsageError(unknown_name("action", name, ACTIONS), field="action")
    return ACTIONS[name](session, fields)


def new_session(name: str) -> Session:
    """An empty one. Seeds depend on its name: the same words begin another story each time."""
    return Session.of(Document(id=name))


def title_of(session: Session) -> str:
    """What a person called it; empty where nobody did."""
    title = (session.head.get("meta") or {}).get(TITLE)
    return title if isinstance(title, str) else ""


def as_one_step(before: Session, after: Session) -> Session:
    """`after`, as if it had been reached from `before` at once: a single `undone` leads back."""
    path = before.tree.path
    if path == after.tree.path:
        return replace(after, tree=replace(after.tree, past=before.tree.past, future=before.tree.future))
    tip = path[-1] if path else ROOT
    return replace(after, tree=replace(after.tree, past=(*before.tree.past, tip), future=()))


# ---- Each action ---------------------------------------------------------------------------------------


def _insert(session: Session, fields: Fields) -> Session:
    """Texts and images before part `index`, or at the end."""
    parts = fields.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(p, Text | Image) for p in parts):
        raise UsageError("parts: expected a list of texts and images, found none", field="parts")
    return session.showing(session.document.inserted(_number(fields, "index"), *parts))


def _edit(session: Session, fields: Fields) -> Session:
    """Another text in the place of part `index`; the same text again changes nothing."""
    index, text = _number(fields, "index"), _text(fields, "text")
    document = session.document
    edited = document.edited(index, text)
    old = document.parts[index]
    if isinstance(old, Text) and old.text == text:
        return session
    return session.showing(edited)


def _replace(session: Session, fields: Fields) -> Session:
    """Another image in the place of part `index`."""
    image = fields.get("image")
    if not isinstance(image, Image):
        raise UsageError("image: expected an image, found none", field="image")
    return session.showing(session.document.edited(_number(fields, "index"), image))


def _delete(session: Session, fields: Fields) -> Session:
    return session.showing(session.document.without(_number(fields, "index")))


def _move(session: Session, fields: Fields) -> Session:
    """Part `index` so that it becomes part `to`."""
    return session.showing(session.document.moved(_number(fields, "index"), _number(fields, "to")))


def _branch(session: Session, fields: Fields) -> Session:
    """What comes before part `index`, to go on another way; the rest is hidden, not lost."""
    return session.showing(session.document.branched(_number(fields, "index")))


def _step(session: Session, fields: Fields) -> Session:
    return session.stepped(_number(fields, "index"), _number(fields, "by"))


def _choose(session: Session, fields: Fields) -> Session:
    return session.choosing(_number(fields, "node"))


def _undo(session: Session, fields: Fields) -> Session:
    return session.undone()


def _redo(session: Session, fields: Fields) -> Session:
    return session.redone()


def _rename(session: Session, fields: Fields) -> Session:
    title = " ".join(_text(fields, TITLE).split())
    if len(title) > MAX_TITLE:
        raise UsageError(f"title: found {len(title)} characters, expected at most {MAX_TITLE}", field=TITLE)
    meta = {name: value for name, value in (session.head.get("meta") or {}).items() if name != TITLE}
    return _with_head(session, meta={**meta, TITLE: title} if title else meta)


def _settings(session: Session, fields: Fields) -> Session:
    """Generation settings of this document by name; null is the model's own again."""
    changes = fields.get("changes")
    if not isinstance(changes, Mapping):
        raise UsageError("changes: expected settings by name, found none", field="changes")
    kept = {**(session.head.get("generation") or {}), **changes}
    chosen = {name: value for name, value in kept.items() if value is not None}
    GenerationSettings.combine(chosen)
    return _with_head(session, generation=chosen)


def _layout(session: Session, fields: Fields) -> Session:
    return _with_head(session, layout=canonical_layout(_text(fields, "layout")))


ACTIONS: dict[str, Callable[[Session, Fields], Session]] = {
    "insert": _insert,
    "edit": _edit,
    "replace": _replace,
    "delete": _delete,
    "move": _move,
    "branch": _branch,
    "step": _step,
    "choose": _choose,
    "undo": _undo,
    "redo": _redo,
    "rename": _rename,
    "settings": _settings,
    "layout": _layout,
}


def _with_head(session: Session, **changes: Any) -> Session:
    head = {name: value for name, value in {**session.head, **changes}.items() if value}
    return replace(session, head=head)


def _number(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: found {escape(repr(value))}, expected a whole number", field=name)
    return value


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise UsageError(f"{name}: found {escape(repr(value))}, expected a text", field=name)
    return value
