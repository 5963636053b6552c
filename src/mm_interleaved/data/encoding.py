"""Documents into sequences that fit a row. What cannot be used is named, never replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mm_interleaved.data.few_shot import FewShot, merge_documents
from mm_interleaved.data.packing import RowRule, cut_to_fit
from mm_interleaved.documents.document import Document, Image, Part
from mm_interleaved.errors import ImageError, InputError
from mm_interleaved.tokens.sequence import LearningRule, Sequence, encode_document
from mm_interleaved.tokens.vocabulary import Vocabulary


class Skip(NamedTuple):
    """A document, or an item that should be one, that is left out. Counted, logged, never replaced."""

    source: str
    place: str
    """The document's id, or the file and the place in it."""
    kind: str
    """`broken` (it is none), `image` (one cannot be read), `refused` (it cannot be encoded), `too_long`,
    `no_target` (nothing of it counts in a loss)."""
    reason: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What became of a group of documents."""

    pieces: tuple[Sequence, ...] = ()
    skips: tuple[Skip, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    """`cut`: documents longer than a row; `tokens_left_out`: what of them no row has."""

    def __add__(self, other: Prepared) -> Prepared:
        return Prepared(self.pieces + other.pieces, self.skips + other.skips, self.counts + other.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How documents of one source become sequences."""

    source: str
    """Its name."""
    vocabulary: Vocabulary
    rule: RowRule
    learn: LearningRule
    few_shot: FewShot | None

    def __call__(self, group: SequenceABC[Document]) -> Prepared:
        """The sequences of documents that are to be merged, with their images opened.

        Images are opened here and not when a batch is made: a document is left out before it is in a row.
        """
        readable, skips = [], []
        for document in group:
            try:
                readable.append(_with_open_images(document))
            except ImageError as error:
                skips.append(Skip(self.source, document.id, "image", str(error)))
        return Prepared(skips=tuple(skips)) + self._merged(readable)

    def _merged(self, documents: SequenceABC[Document]) -> Prepared:
        """As many in one as fit into a row together."""
        if not documents:
            return Prepared()
        document = merge_documents(documents, self.few_shot.separator if self.few_shot else "")
        try:
            # Every document ends: a row shows where.
            sequence = encode_document(
                document, self.vocabulary, eos=True, include_target=True, learn=self.learn
            )
        except InputError as error:
            if len(documents) == 1:
                return Prepared(skips=(Skip(self.source, document.id, "refused", str(error)),))
            return self._halves(documents)
        if len(documents) > 1 and not self.rule.has_room(len(sequence), len(sequence.images)):
            return self._halves(documents)
        fitted = self._fitted(document, sequence)
        # Each document is skipped for a reason of its own.
        return self._halves(documents) if len(documents) > 1 and fitted.skips else fitted

    def _halves(self, documents: SequenceABC[Document]) -> Prepared:
        middle = len(documents) // 2
        return self._merged(documents[:middle]) + self._merged(documents[middle:])

    def _fitted(self, document: Document, sequence: Sequence) -> Prepared:
        if self.rule.compat == "released":
            return Prepared((sequence,))
        pieces, counts = (sequence,), Counter()
        if not self.rule.has_room(len(sequence), len(sequence.images)):
            # An answer without its question, or a question without its answer, is of no use.
            is_prompted = bool(document.target) or any(part.role is not None for part in document.parts)
            cut = cut_to_fit(sequence, self.rule, keep_beginning=is_prompted)
            if self.rule.too_long == "skip" or not cut.pieces:
                return Prepared(skips=(Skip(self.source, document.id, "too_long", self._too_long(sequence)),))
            pieces, counts = cut.pieces, Counter(cut=1, tokens_left_out=cut.lost_tokens)
        useful = tuple(piece for piece in pieces if piece.has_targets)
        if not useful:
            reason = "nothing of it counts in a loss"
            return Prepared(skips=(Skip(self.source, document.id, "no_target", reason),))
        counts["tokens_left_out"] += sum(map(len, pieces)) - sum(map(len, useful))
        return Prepared(useful, counts=counts)

    def _too_long(self, sequence: Sequence) -> str:
        return (
            f"found {len(sequence)} tokens and {len(sequence.images)} images, expected at most "
            f"{self.rule.max_length} and {'any' if self.rule.max_images is None else self.rule.max_images}"
        )


def _with_open_images(document: Document) -> Document:
    """The document with its images in memory. Raises ImageError."""

    def opened(part: Part) -> Part:
        return replace(part, source=part.load()) if isinstance(part, Image) else part

    return replace(
        document, parts=tuple(map(opened, document.parts)), target=tuple(map(opened, document.target))
    )
