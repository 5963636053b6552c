"""The only input and the only output: a document of text and image parts.

No tokens, no tensors here. Documents never change: an edit returns another document, which shares its parts
with the one before (`parts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from mm_interleaved.documents.part_tree import PartTree
from mm_interleaved.documents.parts import Image, Part, Text, part_record
from mm_interleaved.documents.session_files import (
    SavedSession,
    SessionFolder,
    read_session,
    session_file,
)
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.files import put_aside


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Parts in reading order, and what is asked about them."""

    id: str = "document"
    parts: tuple[Part, ...] = ()
    """Text and Image, in a list or a tuple."""
    target: tuple[Part, ...] = ()
    """The gold continuation, where one is known."""
    layout: str | None = None
    """Parts wanted in order (`"T I T"`), or `"auto"`."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Generation arguments of this document; they override those of the run."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that belongs to the record, carried along untouched."""
    place: str = field(default="", compare=False, repr=False)
    """Of a document that was read: file and line, for messages; it is not written."""
    remarks: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What of its record was not used, or is doubtful, in a few words each (`documents.record_rules`).
    Not written."""

    def __post_init__(self):
        for name in ("parts", "target"):
            object.__setattr__(self, name, _parts(name, getattr(self, name)))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of the document itself (not of its target), in order."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """The text of the document itself, its parts joined by a space."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))

    def extended(self, *parts: Part) -> Document:
        """The same document with more parts at its end."""
        return replace(self, parts=(*self.parts, *parts))

    # ---- Edits: pure functions, each part in its place ---------------------------------------------

    def edited(self, index: int, part: Part | str) -> Document:
        """The same document with another part in the place of part `index` (from 0).

        A string is a text; a part without a role takes that of the one it replaces. What is written by hand
        counts as given, not as generated.

        Raises:
            UsageError: there is no such part.
            TypeError: `part` is neither.

        >>> story = Document(parts=[Text("Pip finds a lamp."), Text("It glows.", generated=True)])
        >>> story.edited(1, "It is broken.").parts[1]
        Text(text='It is broken.', role=None, generated=False, seed=None)
        """
        self._check(index, len(self.parts) - 1)
        new = _as_part(part, self.parts[index].role)
        parts = [*self.parts[:index], new, *self.parts[index + 1 :]]
        return self._rearranged(parts, lambda place: place)

    def without(self, index: int) -> Document:
        """The same document without part `index`. Indices of earlier images in `generation` follow their
        images. Raises UsageError: there is no such part.

        >>> Document(parts=[Text("a"), Text("b"), Text("c")]).without(1).text
        'a c'
        """
        self._check(index, len(self.parts) - 1)
        parts = [*self.parts[:index], *self.parts[index + 1 :]]
        return self._rearranged(parts, lambda place: None if place == index else place - (place > index))

    def inserted(self, index: int, *parts: Part | str) -> Document:
        """The same document with more parts before part `index`, or at its end. In a conversation, parts
        without a role take that of the part before them. Indices of earlier images in `generation` follow
        their images.

        Raises:
            UsageError: there is no such place.
            TypeError: something is no part.

        >>> Document(parts=[Text("a"), Text("c")]).inserted(1, "b").text
        'a b c'
        """
        self._check(index, len(self.parts))
        beside = self.parts[max(0, index - 1) : index] or self.parts[:1]
        role = beside[0].role if beside else None
        new = [_as_part(part, role) for part in parts]
        arranged = [*self.parts[:index], *new, *self.parts[index:]]
        return self._rearranged(arranged, lambda place: place + len(new) * (place >= index))

    def moved(self, index: int, to: int) -> Document:
        """The same document with part `index` where part `to` stands now. Indices of earlier images in
        `generation` follow their images. Raises UsageError: there is no such part.

        >>> Document(parts=[Text("a"), Text("b"), Text("c")]).moved(2, 0).text
        'c a b'
        """
        self._check(index, len(self.parts) - 1)
        self._check(to, len(self.parts) - 1)
        order = [place for place in range(len(self.parts)) if place != index]
        order.insert(to, index)
        return self._rearranged([self.parts[place] for place in order], order.index)

    def branched(self, index: int, *, id: str | None = None) -> Document:
        """The document before part `index`, to go on from there another way.

        Args:
            id: another name. Seeds depend on it, unless they are given.

        Raises UsageError: there is no such place.

        >>> Document(parts=[Text("a"), Text("b"), Text("c")]).branched(1).text
        'a'
        """
        self._check(index, len(self.parts))
        return replace(self, parts=self.parts[:index], id=self.id if id is None else id)

    def _check(self, index: int, last: int):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= last:
            expected = f"0 to {last}" if last >= 0 else "none, it is empty"
            raise UsageError(
                f"document {escape(self.id)!r}: part: found {index!r}, expected {expected}", field="part"
            )

    def _rearranged(self, parts: Sequence[Part], moved: Callable[[int], int | None]) -> Document:
        """The document of these parts.

        Args:
            moved: where each part of its own is now, None for one that is gone.
        """
        changed = replace(self, parts=tuple(parts))
        before, after = (
            [place for place, part in enumerate(document.parts) if isinstance(part, Image)]
            for document in (self, changed)
        )
        places = [moved(place) for place in before]
        now = [after.index(place) if place in after else None for place in places]
        return replace(changed, generation=_with_moved_images(self.generation, now, len(after)))

    # ---- On disk -----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes `session.json` and `images/` into a folder, whole or not at all; returns the file, which
        `load` and `generate` read.

        A session of the same document that is there is kept: what it shows now becomes an alternative, as all
        that it held before (`Session` shows them). One that is damaged is put aside under another name.

        Raises:
            UsageError: the folder holds the session of another document.
            ImageError: an image cannot be read.
            StorageError: the folder cannot be written.
        """
        folder = Path(folder)
        tree = PartTree()
        if session_file(folder).exists():
            there = read_session(folder)
            found = there.head.get("id")
            if there.losses:
                put_aside(session_file(folder))
            elif found != self.id:
                raise UsageError(
                    f"{folder}: holds the session of {escape(repr(found))}, expected that of "
                    f"{escape(self.id)!r}; choose another folder"
                )
            else:
                tree = there.tree
        return SessionFolder(folder).save(self.head(), tree.showing(self.parts))

    @classmethod
    def load(cls, path: str | Path, *, image_root: str | Path | None = None) -> Document:
        """The document that a session shows, from its folder or its `session.json`.

        Of a damaged session, what is whole; its `remarks` say what is lost.

        Args:
            image_root: folder that bounds all image paths; the file's own by default.

        Raises:
            InputError: there is no such file, it is of another format, or nothing in it is whole.
        """
        return document_of(read_session(path, image_root), str(session_file(path)))

    def head(self) -> dict[str, Any]:
        """What it is besides its parts, by field, as `document_of` takes it."""
        fields = ("id", "layout", "generation", "meta", "target")
        return {name: value for name in fields if (value := getattr(self, name))}


def document_of(saved: SavedSession, place: str = "") -> Document:
    """The document that a saved session shows; its remarks say what is lost."""
    head: dict[str, Any] = {"id": "session", **saved.head}
    return Document(**head, parts=saved.tree.parts, place=place, remarks=saved.losses)


def _as_part(part: Any, role: str | None) -> Part:
    """A part out of what an edit is given; in a role, where it has none itself."""
    part = Text(part) if isinstance(part, str) else part
    [checked] = _parts("part", [part])
    return checked if checked.role is not None or role is None else replace(checked, role=role)


def _with_moved_images(
    generation: Mapping[str, Any], now: Sequence[int | None], num_images: int
) -> Mapping[str, Any]:
    """Generation arguments whose indices of earlier images (`context_images`) name the same images as before.
    Where none of them is left, the choice goes with them.

    Args:
        now: the index that each former image has now, None for one that is gone.
        num_images: how many there are now. What named an image still to come names it still.
    """
    given = generation.get("context_images")
    words = given.split(",") if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(str(word).strip().isdecimal() for word in words):
        return generation
    indices = [int(str(word)) for word in words]
    shift = num_images - len(now)
    kept = [now[index] if index < len(now) else index + shift for index in indices]
    left = [index for index in kept if index is not None]
    others = {name: value for name, value in generation.items() if name != "context_images"}
    return {**others, "context_images": ",".join(map(str, left))} if left else others


def _parts(name: str, given: Any) -> tuple[Part, ...]:
    """The parts of a document out of a list, which callers have at hand, or a tuple. Raises TypeError."""
    if isinstance(given, str | Mapping | Text | Image) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a list of Text and Image, found {type(given).__name__}")
    parts = tuple(given)
    for index, part in enumerate(parts):
        if not isinstance(part, Text | Image):
            kind = "Text" if isinstance(part, str) else "Image"
            raise TypeError(
                f"{name}[{index}]: expected Text or Image, found {type(part).__name__}; "
                f"write {kind}(…) around it"
            )
    return parts


ImagePath: TypeAlias = Callable[[Image, int], str]


def part_records(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a canonical record, in order, whether they stand in its `content` or in `messages`."""
    turns = [part for message in record.get("messages", ()) for part in message["content"]]
    return [*record.get("content", ()), *turns]


def document_to_record(document: Document, image_path: ImagePath) -> dict[str, Any]:
    """The canonical JSON record of a document.

    Args:
        image_path: states where the k-th image stands (counted over the parts, then the target): a path
            relative to the file that the record goes into, or a `data:` URL.

    Returns:
        A dict of JSON values. Read back, it gives the same document.
    """
    image_count = 0

    def written(part: Part, with_role: bool) -> dict[str, Any]:
        nonlocal image_count
        path = ""
        if isinstance(part, Image):
            path = image_path(part, image_count)
            image_count += 1
        return part_record(part, path, with_role=with_role)

    record: dict[str, Any] = {"id": document.id}
    if document.parts and all(part.role is not None for part in document.parts):
        record["messages"] = [
            {"role": role, "content": [written(part, with_role=False) for part in parts]}
            for role, parts in groupby(document.parts, key=lambda part: part.role)
        ]
    else:
        record["content"] = [written(part, with_role=True) for part in document.parts]
    if document.target:
        record["target"] = [written(part, with_role=True) for part in document.target]
    if document.layout is not None:
        record["layout"] = document.layout
    if document.generation:
        record["generation"] = dict(document.generation)
    if document.meta:
        record["meta"] = dict(document.meta)
    return record


def answer_parts(document: Document) -> tuple[Part, ...]:
    """What was generated: the parts marked so, or all parts where none is marked."""
    return tuple(part for part in document.parts if part.generated) or document.parts
