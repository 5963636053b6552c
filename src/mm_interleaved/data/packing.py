"""Sequences into rows of a fixed length: borders respected, images never cut.

A row holds whole documents, one after the other, until the next one does not fit. Only a document that is
longer than a row is cut, at the border of a part. With `compat="released"` rows are filled as in the
published loader: a document is cut wherever its row is full (never inside an image), and goes on in the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mm_interleaved.errors import UsageError
from mm_interleaved.tokens.sequence import Sequence, slice_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """What fits into a row, and what happens to what does not."""

    max_length: int
    """Tokens."""
    max_images: int | None = None
    """None sets no limit."""
    too_long: str = "cut"
    """What happens to a document that is longer than a row: `cut` at the borders of its parts, or `skip`."""
    compat: str | None = None
    """`released` fills rows as the published loader does."""
    keep_pairs: bool = False
    """With `compat`: a document whose image would be cut goes into the next row as a whole (published for
    pairs), instead of its image alone (published for MMC4)."""

    def __post_init__(self):
        if self.max_length < 1 or (self.max_images is not None and self.max_images < 1):
            raise UsageError(
                "a row holds at least 1 token and 1 image, found a limit of "
                f"{self.max_length} tokens and {self.max_images} images"
            )
        if self.too_long not in ("cut", "skip"):
            raise UsageError(f"too_long: expected cut or skip, found {self.too_long!r}")
        if self.compat not in (None, "released"):
            raise UsageError(f"compat: expected released or nothing, found {self.compat!r}")

    def has_room(self, length: int, images: int) -> bool:
        """So many tokens and images fit into a row."""
        return length <= self.max_length and (self.max_images is None or images <= self.max_images)


class Cut(NamedTuple):
    """What is left of a document after it was made to fit."""

    pieces: tuple[Sequence, ...]
    """Each fits into a row."""
    lost_tokens: int = 0
    """Left out, because a part alone does not fit or because nothing stands before it any more."""


def cut_to_fit(sequence: Sequence, rule: RowRule, *, keep_beginning: bool = False) -> Cut:
    """A document cut at the borders of its parts, if it does not fit into a row.

    Pieces after the first begin like documents of their own. A part that is longer than a row is left out.

    Args:
        keep_beginning: only the beginning can stand alone (a conversation): it is kept as far as it fits and
            ends with something that counts, and the rest is left out.
    """
    if rule.has_room(len(sequence), len(sequence.images)):
        return Cut((sequence,))
    borders = [*sequence.part_starts.tolist(), len(sequence)]
    if keep_beginning:
        _, last = _longest_piece(sequence, borders, 0, rule)
        return _answered_beginning(sequence, borders[: last + 1])
    pieces: list[Sequence] = []
    lost = first = 0
    while first < len(borders) - 1:
        piece, last = _longest_piece(sequence, borders, first, rule)
        if piece is None:
            last = first + 1
            lost += borders[last] - borders[first]
        else:
            pieces.append(piece)
        first = last
    return Cut(tuple(pieces), lost)


def _longest_piece(
    sequence: Sequence, borders: list[int], first: int, rule: RowRule
) -> tuple[Sequence | None, int]:
    """As many parts from number `first` on as fit into a row, and the number of the next part."""
    piece, last = None, first
    while last < len(borders) - 1:
        longer = slice_sequence(sequence, borders[first], borders[last + 1], with_head=True)
        if not rule.has_room(len(longer), len(longer.images)):
            break
        piece, last = longer, last + 1
    return piece, last


def _answered_beginning(sequence: Sequence, borders: list[int]) -> Cut:
    """The longest beginning up to one of the borders whose last part counts."""
    for begin, end in zip(reversed(borders[:-1]), reversed(borders[1:]), strict=True):
        if sequence.text_is_target[begin:end].any():
            return Cut((slice_sequence(sequence, 0, end),), len(sequence) - end)
    return Cut((), len(sequence))


class Sequences(Protocol):
    """A stream of sequences that are taken from its front."""

    def peek(self) -> Sequence:
        """What is next: of a sequence that has been taken in part, the rest."""
        ...

    def take(self, num_tokens: int | None = None) -> None:
        """Moves on, behind the next sequence or behind its first tokens."""
        ...

    @property
    def is_inside(self) -> bool:
        """The next sequence has been taken in part."""
        ...


def fill_row(sequences: Sequences, rule: RowRule, num_slots: int) -> list[Sequence]:
    """Takes what makes the next row. Without `compat`, each sequence must fit into a row by itself.

    Args:
        num_slots: slots an image.
    """
    if rule.compat == "released":
        return _fill_released_row(sequences, rule, num_slots)
    row: list[Sequence] = []
    length = images = 0
    while True:
        sequence = sequences.peek()
        length, images = length + len(sequence), images + len(sequence.images)
        if row and not rule.has_room(length, images):
            return row
        row.append(sequence)
        sequences.take()


def _fill_released_row(sequences: Sequences, rule: RowRule, num_slots: int) -> list[Sequence]:
    row: list[Sequence] = []
    room = rule.max_length
    is_full = False
    while not is_full:
        sequence = sequences.peek()
        images = sum(len(taken.images) for taken in row)
        # Only a document that begins here can go into the next row as a whole.
        may_move = rule.keep_pairs and bool(row) and not sequences.is_inside
        end, is_full = _released_end(sequence, rule, room, images, num_slots, may_move=may_move)
        if not end and not row:
            raise UsageError(f"max_length {rule.max_length}: expected room for an image ({num_slots + 1})")
        if end:
            row.append(slice_sequence(sequence, 0, end))
            sequences.take(end)
        room -= end
    return row


def _released_end(
    sequence: Sequence, rule: RowRule, room: int, images: int, num_slots: int, *, may_move: bool
) -> tuple[int, bool]:
    """How many tokens of a sequence a row takes, and whether the row then is full.

    Differs from the published rule in one place: at the limit of images, the words behind the last allowed
    image stay with it, up to the next one.

    Args:
        room, images: tokens that the row has left, images that it holds.
        may_move: leave the whole sequence to the next row rather than cutting it before an image.
    """
    end, starts = min(room, len(sequence)), sequence.image_starts
    free_images = len(starts) if rule.max_images is None else rule.max_images - images
    # 1. More images than allowed.
    if (starts < end).sum() > free_images:
        return (0 if may_move and not free_images else int(starts[free_images])), True
    # 2. An image across the end of the row.
    crossing = starts[(starts < end) & (starts + 1 + num_slots > end)]
    if len(crossing):
        return (0 if may_move else int(crossing[0])), True
    return end, end == room
