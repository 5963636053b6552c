"""Few-shot documents: several documents of one task in one prompt, the first of them as examples.

The released loader means to do this to pairs and does not (it tests a mask in place of ids).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from mm_interleaved.documents.document import Document, Part, Text
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.tokens.conversation_format import ANSWERING_ROLE

_PARTS_OF_ONE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShot:
    """How often documents are merged, and how many of them (numbers of the released configuration)."""

    share: float = 0.25
    """How often a document begins a group, 0 to 1."""
    min_documents: int = 2
    max_documents: int = 8
    separator: str = "\n"
    """Goes between a text that ends an example and what follows; not in conversations, whose turns end."""

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected 0 to 1, found {self.share}")
        if not 2 <= self.min_documents <= self.max_documents:
            raise ValueError(
                f"expected 2 <= min_documents <= max_documents, found {self.min_documents} and "
                f"{self.max_documents}"
            )


def group_documents(
    documents: Iterable[Document], rule: FewShot | None, rng: SeededRandom
) -> list[tuple[Document, ...]]:
    """The documents, some of them in groups of one task (`meta["task"]`) and one form; none is lost.

    A group stands where its last document stood.
    """
    if rule is None:
        return [(document,) for document in documents]
    groups: list[tuple[Document, ...]] = []
    open_groups: dict[Hashable, tuple[int, list[Document]]] = {}
    for document in documents:
        kind = _kind(document)
        if kind not in open_groups:
            if rng.below(_PARTS_OF_ONE) >= rule.share * _PARTS_OF_ONE:
                groups.append((document,))
                continue
            open_groups[kind] = rng.between(rule.min_documents, rule.max_documents), []
        size, members = open_groups[kind]
        members.append(document)
        if len(members) == size:
            groups.append(tuple(members))
            del open_groups[kind]
    # What is left over at the end is merged as far as it goes.
    return groups + [tuple(members) for _, members in open_groups.values()]


def merge_documents(documents: Sequence[Document], separator: str = "\n") -> Document:
    """One document that asks the last one's question after answering all others'.

    What a document has as its `target` stands in full where it is an example; the merged document has the
    last one's. So of documents with a target only the last answer counts in the losses; of others (pairs,
    conversations with their answers), all that counted before.
    """
    *examples, question = documents
    if not examples:
        return question
    parts: list[Part] = []
    for document in examples:
        _extend(parts, _answered(document))
        last = parts[-1] if parts else None
        if isinstance(last, Text) and last.role is None:
            parts[-1] = replace(last, text=last.text + separator)
    _extend(parts, question.parts)
    name = "+".join(document.id for document in documents)
    return replace(question, id=name, parts=tuple(parts))


def _kind(document: Document) -> Hashable:
    """Documents of one kind can be merged."""
    has_roles = any(part.role is not None for part in document.parts)
    return str(document.meta.get("task", "")), has_roles, bool(document.target)


def _answered(document: Document) -> tuple[Part, ...]:
    """A document's parts and its target, which is the assistant's if there are roles."""
    has_roles = any(part.role is not None for part in document.parts)
    answer = [
        replace(part, role=part.role or ANSWERING_ROLE) if has_roles else part for part in document.target
    ]
    return (*document.parts, *answer)


def _extend(parts: list[Part], more: Sequence[Part]):
    """Adds parts, but no system sentence that is there already."""
    parts += [part for part in more if part.role != "system" or part not in parts]
