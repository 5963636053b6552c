"""A document as token ids and image slots.

Layout: bos, then the parts in order: a text as its ids, an image as its start token and `num_slots` slot ids.
Each text part is tokenized by itself, so that a text after an image begins a fresh piece. Slots are put in as
numbers and recorded in `image_starts`; nobody finds them by looking at ids.
Letters: T tokens, I images.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace

import numpy as np

from mm_interleaved.document import Document, Image, Part, Text
from mm_interleaved.prompts import Piece, conversation_pieces
from mm_interleaved.vocabulary import Vocabulary


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

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_document(
    document: Document,
    vocabulary: Vocabulary,
    *,
    bos: bool = True,
    eos: bool = False,
    include_target: bool = False,
) -> Sequence:
    """The tokens of a document.

    What counts in the loss: all text, eos and image starts, and all images; not bos, not slots, and neither
    the start token nor the pixels of an image directly after bos, which nothing announces. In a conversation
    only what the assistant says counts. In a document that has a `target`, only the target counts, and the
    eos after it.

    Args:
        bos: begin with bos; False for the second half of a document that was cut.
        eos: end with eos.
        include_target: append the document's target.

    Raises:
        InputError: text that cannot be encoded.
    """
    builder = _Builder(vocabulary)
    if bos:
        builder.add([vocabulary.bos], is_target=False)
    pieces = _pieces(document, include_target)
    for piece in pieces:
        if isinstance(piece.part, Image):
            # Nothing stands before an image that begins the document: it cannot be predicted.
            begins = len(builder.input_ids) == int(bos)
            builder.add_image(piece.part, is_target=piece.is_target and not begins)
        else:
            builder.add(vocabulary.encode_text(piece.part.text), piece.is_target)
        if piece.ends_turn:
            builder.add([vocabulary.eos], piece.is_target)
    if eos:
        builder.add([vocabulary.eos], is_target=not document.target or include_target)
    return builder.build()


def decode_sequence(
    ids: SequenceABC[int] | np.ndarray,
    image_starts: SequenceABC[int] | np.ndarray,
    vocabulary: Vocabulary,
    images: SequenceABC[Image],
) -> tuple[Part, ...]:
    """The parts that ids stand for: text between images, and the images. Special ids are left out.

    Two texts that touch come back as one; conversation markers come back as text.
    """
    if len(image_starts) != len(images):
        raise ValueError(f"found {len(images)} images for {len(image_starts)} image starts, expected as many")
    parts: list[Part] = []

    def add_text(begin: int, end: int):
        text = vocabulary.decode(ids[begin:end])
        if text:
            parts.append(Text(text))

    position = 0
    for start, image in zip(image_starts, images, strict=True):
        add_text(position, int(start))
        parts.append(image)
        position = int(start) + 1 + vocabulary.num_slots
    add_text(position, len(ids))
    return tuple(parts)


def cut_sequence(sequence: Sequence, max_length: int, num_slots: int) -> Sequence:
    """The longest beginning of a sequence that fits, its images whole or absent."""
    end = min(len(sequence), max_length)
    for start in sequence.image_starts:
        if start < end < start + 1 + num_slots:
            end = int(start)
    kept = int((sequence.image_starts < end).sum())
    return Sequence(
        input_ids=sequence.input_ids[:end],
        image_starts=sequence.image_starts[:kept],
        images=sequence.images[:kept],
        text_is_target=sequence.text_is_target[:end],
        image_is_target=sequence.image_is_target[:kept],
    )


def _pieces(document: Document, include_target: bool) -> list[Piece]:
    target = document.target if include_target else ()
    if any(part.role is not None for part in document.parts):
        pieces = conversation_pieces(document.parts, target)
    else:
        pieces = [Piece(part, is_target=not target) for part in document.parts]
        pieces += [Piece(part, is_target=True) for part in target]
    if document.target and not include_target:
        return [replace(piece, is_target=False) for piece in pieces]
    return pieces


class _Builder:
    """Collects ids with their provenance."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.input_ids: list[int] = []
        self.text_is_target: list[bool] = []
        self.image_starts: list[int] = []
        self.images: list[Image] = []
        self.image_is_target: list[bool] = []

    def add(self, ids: list[int], is_target: bool):
        self.input_ids += ids
        self.text_is_target += [is_target] * len(ids)

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
            image_is_target=np.array(self.image_is_target, dtype=bool),
        )
