"""Rows of a fixed length: nothing lost, borders kept, images whole."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.data.packing import RowRule, cut_to_fit, fill_row
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.tokens.sequence import encode_document, slice_sequence

RED, BLUE = (Image(PILImage.new("RGB", (9, 5), colour)) for colour in ("red", "blue"))
parts = st.sampled_from([Text("Pip finds a lamp."), Text("<|image|></s>"), RED, BLUE])
documents = st.lists(st.lists(parts, min_size=1, max_size=5), min_size=1, max_size=6)


class Queue:
    """A stream of sequences that ends, for `fill_row`."""

    def __init__(self, sequences):
        self.sequences, self.offset = list(sequences), 0

    @property
    def is_inside(self):
        return self.offset > 0

    def peek(self):
        if not self.sequences:
            raise EOFError
        return slice_sequence(self.sequences[0], self.offset, len(self.sequences[0]))

    def take(self, num_tokens=None):
        self.offset = len(self.sequences[0]) if num_tokens is None else self.offset + num_tokens
        if self.offset == len(self.sequences[0]):
            self.sequences.pop(0)
            self.offset = 0

    def rows(self, rule, num_slots):
        found = []
        while True:
            before = list(self.sequences)
            try:
                found.append(fill_row(self, rule, num_slots))
            except EOFError:
                return found, before


def encoded(vocabulary, *parts, **more):
    return encode_document(Document(id="d", parts=parts, **more), vocabulary, eos=True, include_target=True)


@given(documents=documents, limit=st.integers(24, 90))
def test_rows_hold_whole_documents_in_order_within_both_limits(byte_level_vocabulary, documents, limit):
    rule = RowRule(max_length=limit, max_images=2)
    sequences = [encoded(byte_level_vocabulary, *parts) for parts in documents]
    fitting = [sequence for sequence in sequences if rule.has_room(len(sequence), len(sequence.images))]
    rows, rest = Queue(fitting).rows(rule, 3)
    taken = [sequence for row in [*rows, rest] for sequence in row]
    assert [s.input_ids.tolist() for s in taken] == [s.input_ids.tolist() for s in fitting]
    for row, following in pairwise([*rows, rest]):
        assert sum(map(len, row)) <= limit and sum(len(sequence.images) for sequence in row) <= 2
        # A row ends only where the next document does not fit.
        longer = [*row, *following[:1]]
        assert not rule.has_room(sum(map(len, longer)), sum(len(s.images) for s in longer))


@given(parts=st.lists(parts, min_size=1, max_size=9), limit=st.integers(5, 60))
def test_a_document_longer_than_a_row_is_cut_at_borders_of_parts_alone(vocabulary, parts, limit):
    rule = RowRule(max_length=limit, max_images=2)
    sequence = encoded(vocabulary, *parts)
    cut = cut_to_fit(sequence, rule)
    assert all(rule.has_room(len(piece), len(piece.images)) for piece in cut.pieces)
    if rule.has_room(len(sequence), len(sequence.images)):
        assert cut.pieces == (sequence,) and not cut.lost_tokens
        return
    # Every part is in one piece, as a whole, unless it alone is longer than a row.
    borders = [*sequence.part_starts.tolist(), len(sequence)]
    own = [sequence.input_ids[a:b].tolist() for a, b in pairwise(borders)]
    kept = [ids for ids in own if 1 + len(ids) <= limit]
    found = []
    for piece in cut.pieces:
        assert piece.input_ids[0] == vocabulary.bos
        inside = [*piece.part_starts.tolist(), len(piece)]
        found += [piece.input_ids[a:b].tolist() for a, b in pairwise(inside)]
    assert found == kept
    assert cut.lost_tokens == sum(map(len, own)) - sum(map(len, kept))


def test_a_conversation_is_cut_behind_an_answer_and_the_rest_left_out(byte_level_vocabulary):
    turns = [Text("One?", role="user"), Text("1", role="assistant")] * 4
    sequence = encoded(byte_level_vocabulary, *turns)
    two = encoded(byte_level_vocabulary, *turns[:4])
    for limit in range(len(two), len(two) + 10):
        cut = cut_to_fit(sequence, RowRule(max_length=limit), keep_beginning=True)
        assert cut.pieces[0].input_ids.tolist() == two.input_ids.tolist()
        assert cut.lost_tokens == len(sequence) - len(two)
    assert cut_to_fit(sequence, RowRule(max_length=8), keep_beginning=True) == ((), len(sequence))


def test_a_question_without_its_answer_is_no_piece(byte_level_vocabulary):
    sequence = encoded(byte_level_vocabulary, Text("Pip finds?"), RED, target=(Text("a lamp"),))
    rule = RowRule(max_length=len(sequence) - 1)
    assert cut_to_fit(sequence, rule, keep_beginning=True).pieces == ()


@given(documents=documents, limit=st.integers(8, 40), keep_pairs=st.booleans())
def test_released_rows_are_cut_where_they_are_full_but_never_in_an_image(
    byte_level_vocabulary, documents, limit, keep_pairs
):
    vocabulary = byte_level_vocabulary
    rule = RowRule(max_length=limit, max_images=2, compat="released", keep_pairs=keep_pairs)
    sequences = [encoded(vocabulary, *parts) for parts in documents]
    stream = Queue(sequences)
    rows, _ = stream.rows(rule, vocabulary.num_slots)
    ids = [token for row in rows for piece in row for token in piece.input_ids.tolist()]
    assert ids == [token for s in sequences for token in s.input_ids.tolist()][: len(ids)]
    for row in rows:
        assert sum(map(len, row)) <= limit and sum(len(piece.images) for piece in row) <= 2
        for piece in row:
            expected = len(piece.images) * vocabulary.num_slots
            assert (piece.input_ids == vocabulary.image).sum() == expected
            assert (piece.input_ids == vocabulary.image_start).sum() == len(piece.images)
            assert not piece.text_is_target[0]


def test_released_rows_without_images_in_the_way_are_full(byte_level_vocabulary):
    rule = RowRule(max_length=16, compat="released")
    sequences = [encoded(byte_level_vocabulary, Text("Pip finds a lamp in the garden."))] * 6
    rows, _ = Queue(sequences).rows(rule, 3)
    assert len(rows) > 2 and all(sum(map(len, row)) == 16 for row in rows)


def test_of_pairs_the_whole_document_moves_to_the_next_row_of_others_the_image(byte_level_vocabulary):
    pair = encoded(byte_level_vocabulary, Text("Pip"), RED)
    sequences, limit = [pair, pair], 2 * len(pair) - 3
    for keep_pairs in (True, False):
        rule = RowRule(max_length=limit, compat="released", keep_pairs=keep_pairs)
        row = fill_row(Queue(sequences), rule, 3)
        begun = len(encoded(byte_level_vocabulary, Text("Pip"))) - 1
        assert list(map(len, row)) == ([len(pair)] if keep_pairs else [len(pair), begun])


@pytest.mark.parametrize(
    "wrong", [{"max_length": 0}, {"max_images": 0}, {"too_long": "drop"}, {"compat": "old"}]
)
def test_impossible_rows_are_refused(wrong):
    with pytest.raises(UsageError, match="found"):
        RowRule(**({"max_length": 8} | wrong))


def test_an_image_that_is_longer_than_a_row_is_refused(byte_level_vocabulary):
    rule = RowRule(max_length=3, compat="released")
    with pytest.raises(UsageError, match=r"max_length 3: expected room for an image \(4\)"):
        queue = Queue([encoded(byte_level_vocabulary, RED)])
        for _ in range(2):
            fill_row(queue, rule, 3)
