"""A document with its history: every alternative of every part, one path of them shown.

    Session.of(document) -> showing(document.edited(1, "...")) -> stepped(1, -1) -> undone() -> save(folder)

What is done to a document (edits, parts made again) are functions of documents; a session remembers what it
was before. Sessions never change: each of these returns another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, document_of
from mm_interleaved.documents.part_tree import Alternatives, PartTree
from mm_interleaved.documents.session_files import (
    SavedSession,
    SessionFolder,
    read_session,
    session_file,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A document and all that it has been.

    >>> from mm_interleaved.documents.document import Text
    >>> session = Session.of(Document(id="s1", parts=[Text("Pip finds a lamp."), Text("It glows.")]))
    >>> session = session.showing(session.document.edited(0, "Pip finds a hat."))
    >>> session.document.text
    'Pip finds a hat. It glows.'
    >>> session.stepped(0, -1).document.text, session.undone().document.text
    ('Pip finds a lamp. It glows.', 'Pip finds a lamp. It glows.')
    """

    head: Mapping[str, Any]
    """The document's fields besides its parts, see `Document.head`."""
    tree: PartTree
    losses: tuple[str, ...] = ()
    """Of a session that was read: what was damaged and is lost, a sentence each."""

    @classmethod
    def of(cls, document: Document) -> Session:
        """A session that begins with a document."""
        return cls(head=document.head(), tree=replace(PartTree().showing(document.parts), past=()))

    @property
    def document(self) -> Document:
        """The document that is shown."""
        return document_of(SavedSession(self.head, self.tree))

    @property
    def documents(self) -> tuple[Document, ...]:
        """One document for each path that nothing continues, the oldest first."""
        nodes = self.tree.nodes
        paths = [self.tree.path_to(tip) for tip in self.tree.tips]
        return tuple(replace(self.document, parts=tuple(nodes[n].part for n in path)) for path in paths)

    def alternatives(self, index: int) -> Alternatives:
        """What may stand as part `index`, see `PartTree.alternatives`."""
        return self.tree.alternatives(index)

    def showing(self, document: Document, settings: Mapping[str, Any] | None = None) -> Session:
        """The session in which this document is shown: what it shares with a path that is there stands once,
        all else is added as alternatives.

        Args:
            settings: generation settings that its new parts were made with.
        """
        return replace(self, head=document.head(), tree=self.tree.showing(document.parts, settings))

    def stepped(self, index: int, by: int) -> Session:
        """The session with the next (1) or the last (-1) alternative of part `index`."""
        return replace(self, tree=self.tree.stepped(index, by))

    def choosing(self, node: int) -> Session:
        """The session whose document leads through a node of the tree: a hidden branch is shown."""
        return replace(self, tree=self.tree.choosing(node))

    def undone(self) -> Session:
        """The session that shows what it showed before."""
        return replace(self, tree=self.tree.undone())

    def redone(self) -> Session:
        """Takes back `undone`."""
        return replace(self, tree=self.tree.redone())

    def save(self, folder: str | Path | SessionFolder) -> Path:
        """Writes the session, whole or not at all; the state that stood there before is replaced.

        Args:
            folder: a `SessionFolder`, for who saves often: it writes each image once.

        Raises ImageError, StorageError: then what stood there stands still.
        """
        target = folder if isinstance(folder, SessionFolder) else SessionFolder(folder)
        return target.save(self.head, self.tree)

    @classmethod
    def load(cls, path: str | Path, *, image_root: str | Path | None = None) -> Session:
        """The session of a folder or of a `session.json`, as far as it is whole: `losses` says the rest.

        Raises InputError: there is none, it is of another format, or nothing in it is whole.
        """
        saved = read_session(session_file(path), image_root)
        return cls(head={"id": "session", **saved.head}, tree=saved.tree, losses=saved.losses)
