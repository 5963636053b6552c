"""A document as token ids and image slots.

Layout: bos, then the parts in order: a text as its ids, an image as its start token and `num_slots` slot ids.
Each text part is tokenized by itself, so that a text after an image begins a fresh piece. Slots are put in as
numbers and recorded in `image_starts`; nobody finds them by looking at ids.
Letters: T tokens, I images.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.errors import InputError, escape
from mm_interleaved.tokens.conversation_format import PromptPiece, conversation_pieces
from mm_interleaved.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRule:
    """What of a document may count in the losses, beyond what its roles and its target say.

    A document states it in `meta["learn"]`, as an object with these fields; a corpus states it for all of
    its documents that do not.
    """

    text: str = "all"
    """`all`; `after_image`, text that has an image before it (and every image start and eos); or `none`."""
    images: str | tuple[int, ...] = "all"
    """`all`, `last`, `none`, or indices of images (from 0; from the end if negative)."""

    def __post_init__(self):
        if self.text not in _LEARNED_TEXT:
            raise ValueError(f"text: expected {', '.join(_LEARNED_TEXT)}, found {self.text!r}")
        if isinstance(self.images, str) and self.images not in _LEARNED_IMAGES:
            raise ValueError(
                f"images: expected {', '.join(_LEARNED_IMAGES)} or indices, found {self.images!r}"
            )

    def images_that_count(self, num_images: int) -> np.ndarray:
        """(num_images,) bool."""
        if self.images in ("all", "none"):
            return np.full(num_images, self.images == "all")
        indices = (-1,) if self.images == "last" else self.images
        return np.isin(np.arange(num_images), [i + num_images if i < 0 else i for i in map(int, indices)])


_LEARNED_TEXT = ("all", "after_image", "none")
_LEARNED_IMAGES = ("all", "last", "none")


def learning_rule(document: Document, default: LearningRule | None = None) -> LearningRule:
    """What counts of a document: what its `meta["learn"]` states, else `default`, else everything.

    Raises:
        InputError: `meta["learn"]` is not such a rule.
    """
    record = document.meta.get("learn")
    if record is None:
        return default or LearningRule()
    try:
        if not isinstance(record, Mapping):
            raise ValueError(f"expected an object, found {type(record).__name__}")
        unknown = sorted(set(record) - {"text", "images"})
        if unknown:
            raise ValueError(f"expected the fields text and images, found {unknown[0]!r}")
        return LearningRule(text=record.get("text", "all"), images=_image_choice(record.get("images", "all")))
    except ValueError as error:
        raise InputError(
            f"document {escape(document.id)!r}: meta.learn: {escape(str(error))}", field="meta.learn"
        ) from error


def _image_choice(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(type(index) is int for index in value):
        return tuple(value)
    raise ValueError(f"images: expected a word or a list of whole numbers, found {value!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One document in tokens; everything a batch needs to know about it."""

    input_ids: np.ndarray
    """(T,) int64."""
    image_starts: np.ndarray
    """(I,) int64, ascending: index of each image's start token; its slots are the next `num_slots` ids."""
    images: tuple[Image, ...]
    """I images, in the same order."""
    text_is_target: np.ndarray
    """(T,) bool: this token counts in the text loss, as the one to be predicted."""
    image_is_target: np.ndarray
    """(I,) bool: this image counts in the image loss."""
    part_starts: np.ndarray
    """(P,) int64, ascending: index of the first token of each part, as far as parts are encoded one by one
    (the turns of a prompt are one). An end token belongs to the part before it."""

    @property
    def has_targets(self) -> bool:
        """Something of it counts in a loss."""
        return bool(self.text_is_target.any() or self.image_is_target.any())

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_document(
    document: Document,
    vocabulary: Vocabulary,
    *,
    bos: bool = True,
    eos: bool = False,
    include_target: bool = False,
    learn: LearningRule | None = None,
) -> Sequence:
    """The tokens of a document.

    What counts in the loss: all text, eos and image starts, and all images; not bos, not slots, and neither
    the start token nor the pixels of an image directly after bos, which nothing announces. In a conversation
    only what the assistant says counts. In a document that has a `target`, only the target counts, and the
    eos after it. Of all that, what the document's learning rule leaves.

    Args:
        bos: begin with bos; False for the second half of a document that was cut.
        eos: end with eos.
        include_target: append the document's target.
        learn: the rule for a document that brings none in `meta["learn"]`; default: everything counts.

    Raises:
        InputError: text that cannot be encoded, or a `meta["learn"]` that is no rule.
    """
    rule = learning_rule(document, learn)
    builder = _Builder(vocabulary, rule)
    if bos:
        builder.add([vocabulary.bos], is_target=False)
    pieces = _pieces(document, include_target)
    builder.add_pieces(pieces)
    if eos:
        # After a question that nobody answers there is nothing to end.
        is_answered = not _is_conversation(document) or pieces[-1].is_target
        builder.add([vocabulary.eos], is_target=is_answered and (not document.target or include_target))
    return builder.build()


def encode_pieces(pieces: SequenceABC[PromptPiece], vocabulary: Vocabulary, *, bos: bool = True) -> Sequence:
    """The tokens of a prompt's pieces.

    Raises:
        InputError: text that cannot be encoded.
    """
    builder = _Builder(vocabulary, LearningRule())
    if bos:
        builder.add([vocabulary.bos], is_target=False)
    builder.add_pieces(pieces)
    return builder.build()


def slice_sequence(sequence: Sequence, begin: int, end: int, *, with_head: bool = False) -> Sequence:
    """The tokens from `begin` to before `end` as a sequence of their own.

    What then stands first is predicted by nobody, and an image that stands first is announced by nobody:
    neither counts.

    Args:
        begin, end: borders that cut no image.
        with_head: put what stands before the first part (bos) before them.
    """
    head = int(sequence.part_starts[0]) if with_head and len(sequence.part_starts) else 0
    begin = max(begin, head)
    first = int(np.searchsorted(sequence.image_starts, begin))
    last = int(np.searchsorted(sequence.image_starts, end))
    # From 0 on, so that parts and images move by the same distance.
    keep = np.r_[0:head, begin:end]
    text_is_target, image_is_target = sequence.text_is_target[keep], sequence.image_is_target[first:last]
    image_starts = sequence.image_starts[first:last] - begin + head
    if len(image_starts) and image_starts[0] == head:
        text_is_target[head] = False
        image_is_target = np.r_[False, image_is_target[1:]]
    text_is_target[:1] = False
    inside = (sequence.part_starts >= begin) & (sequence.part_starts < end)
    return Sequence(
        input_ids=sequence.input_ids[keep],
        image_starts=image_starts,
        images=sequence.images[first:last],
        text_is_target=text_is_target,
        image_is_target=image_is_target,
        part_starts=sequence.part_starts[inside] - begin + head,
    )


def _is_conversation(document: Document) -> bool:
    return any(part.role is not None for part in document.parts)


def _pieces(document: Document, include_target: bool) -> list[PromptPiece]:
    target = document.target if include_target else ()
    if _is_conversation(document):
        pieces = conversation_pieces(document.parts, target)
    else:
        pieces = [PromptPiece(part, is_target=not target) for part in document.parts]
        pieces += [PromptPiece(part, is_target=True) for part in target]
    if document.target and not include_target:
        return [replace(piece, is_target=False) for piece in pieces]
    return pieces


class _Builder:
    """Collects ids with their provenance."""

    def __init__(self, vocabulary: Vocabulary, rule: LearningRule):
        self.vocabulary, self.rule = vocabulary, rule
        self.input_ids: list[int] = []
        self.text_is_target: list[bool] = []
        self.image_starts: list[int] = []
        self.images: list[Image] = []
        self.image_is_target: list[bool] = []
        self.part_starts: list[int] = []

    def begin_part(self):
        # A part without tokens is none.
        if len(self.input_ids) not in self.part_starts[-1:]:
            self.part_starts.append(len(self.input_ids))

    def add_pieces(self, pieces: SequenceABC[PromptPiece]):
        num_before = len(self.input_ids)
        for piece in pieces:
            self.begin_part()
            if isinstance(piece.part, Image):
                # Nothing stands before an image that begins the document: it cannot be predicted.
                begins = len(self.input_ids) == num_before
                self.add_image(piece.part, is_target=piece.is_target and not begins)
            else:
                self.add_text(piece.part.text, piece.is_target)
            if piece.ends_turn:
                self.add([self.vocabulary.eos], piece.is_target)

    def add(self, ids: list[int], is_target: bool):
        self.input_ids += ids
        self.text_is_target += [is_target and self.rule.text != "none"] * len(ids)

    def add_text(self, text: str, is_target: bool):
        counts = self.rule.text != "after_image" or bool(self.images)
        self.add(self.vocabulary.encode_text(text), is_target and counts)

    def add_image(self, image: Image, is_target: bool):
        self.image_starts.append(len(self.input_ids))
        self.images.append(image)
        self.image_is_target.append(is_target)
        self.add([self.vocabulary.image_start], is_target)
        self.add([self.vocabulary.image] * self.vocabulary.num_slots, is_target=False)

    def build(self) -> Sequence:
        # Nothing before the first token can predict it (in a packed row, only another document stands there).
        self.text_is_target[:1] = [False] * len(self.text_is_target[:1])
        return Sequence(
            input_ids=np.array(self.input_ids, dtype=np.int64),
            image_starts=np.array(self.image_starts, dtype=np.int64),
            images=tuple(self.images),
            text_is_target=np.array(self.text_is_target, dtype=bool),
            image_is_target=np.array(self.image_is_target, dtype=bool)
            & self.rule.images_that_count(len(self.images)),
            part_starts=np.array([p for p in self.part_starts if p < len(self.input_ids)], dtype=np.int64),
        )
