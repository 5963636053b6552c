"""Who sees whom, against loops that follow the sentences of the docstrings word by word."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from by_ids import document_starts, targets_after_an_image, text_targets
from mm_interleaved.tokens.visibility import (
    IGNORED,
    NO_IMAGE,
    announced_images,
    context_images,
    isolated_causal_mask,
    next_token_labels,
    relative_image_index,
    visible_images,
)

BOS, START, SLOT, PAD, WORD = 1, 3, 4, 0, 7
IMAGE = [START, SLOT, SLOT]
rows = st.lists(st.sampled_from([[BOS], IMAGE, [WORD]]), max_size=12).map(lambda runs: [*chain(*runs)])


@st.composite
def batches(draw):
    """(ids (B, T), image starts (B, N)) of rows of several documents, padded behind."""
    ids = draw(st.lists(rows, min_size=1, max_size=3))
    starts = [[i for i, token in enumerate(row) if token == START] for row in ids]
    length, count = max(len(row) for row in ids) + draw(st.integers(0, 2)), max(len(row) for row in starts)
    ids = [row + [PAD] * (length - len(row)) for row in ids]
    starts = [row + [NO_IMAGE] * (count - len(row)) for row in starts]
    shape = (len(ids), -1) if length else (len(ids), 0)
    image_shape = (len(ids), count)
    return torch.tensor(ids).reshape(shape).long(), torch.tensor(starts).reshape(image_shape).long()


def last_bos(row, position):
    return max((j for j in range(position + 1) if row[j] == BOS), default=-1)


@given(batch=batches())
def test_a_token_sees_the_images_begun_since_the_last_bos(batch):
    ids, starts = batch
    visible = visible_images(document_starts(ids, BOS), starts)
    for b, row in enumerate(ids.tolist()):
        for i in range(len(row)):
            for n, start in enumerate(starts[b].tolist()):
                first_slot = start + 1
                # The released rule, as the golden data have it.
                expected = start != NO_IMAGE and first_slot <= i and first_slot > last_bos(row, i)
                assert visible[b, i, n].item() is expected


@given(batch=batches())
def test_the_newest_visible_image_has_index_1_and_hidden_ones_0(batch):
    ids, starts = batch
    visible = visible_images(document_starts(ids, BOS), starts)
    index = relative_image_index(visible)
    for seen, numbers in zip(visible.flatten(0, 1).tolist(), index.flatten(0, 1).tolist(), strict=True):
        expected, newest = [0] * len(seen), 0
        for n in reversed(range(len(seen))):
            if seen[n]:
                newest += 1
                expected[n] = newest
        assert numbers == expected


def test_an_image_start_does_not_see_its_own_image_but_its_slots_do():
    ids = torch.tensor([[BOS, WORD, *IMAGE, WORD]])
    visible = visible_images(document_starts(ids, BOS), torch.tensor([[2]]))
    assert visible[0, :, 0].tolist() == [False, False, False, True, True, True]


def test_a_new_document_hides_the_images_before_it():
    ids = torch.tensor([[BOS, *IMAGE, BOS, WORD, *IMAGE]])
    visible = visible_images(document_starts(ids, BOS), torch.tensor([[1, 6]]))
    assert visible[0, 5].tolist() == [False, False]
    assert visible[0, 8].tolist() == [False, True]


@given(batch=batches())
def test_packed_documents_are_isolated_and_padding_sees_itself(batch):
    ids, _ = batch
    attention = ids != PAD
    mask = isolated_causal_mask(document_starts(ids, BOS), attention)
    assert mask.shape == (ids.shape[0], 1, ids.shape[1], ids.shape[1])
    for b, row in enumerate(ids.tolist()):
        for i in range(len(row)):
            for j in range(len(row)):
                same_document = j >= max(last_bos(row, i), 0)
                expected = i == j or (j <= i and same_document and row[j] != PAD)
                assert mask[b, 0, i, j].item() is expected


@given(batch=batches(), rule=st.sampled_from(["previous", "all", (0,), (0, 2)]), limit=st.integers(1, 3))
def test_the_painter_sees_earlier_images_of_its_own_document(batch, rule, limit):
    ids, starts = batch
    context = context_images(document_starts(ids, BOS), starts, rule, limit)
    images = [(b, s) for b, row in enumerate(starts.tolist()) for s in row if s != NO_IMAGE]
    assert context.shape[0] == len(images)
    for i, (b, start) in enumerate(images):
        begin = max(last_bos(ids[b].tolist(), start), 0)
        document = [j for j, (row, s) in enumerate(images) if row == b and begin <= s < start]
        if rule == "previous":
            expected = document[-1:]
        elif rule == "all":
            expected = document[-limit:]
        else:
            expected = [document[k] for k in rule if k < len(document)][-limit:]
        found = context[i].tolist()
        assert found[: len(expected)] == expected
        assert all(index == NO_IMAGE for index in found[len(expected) :])


def test_the_context_has_at_least_one_place_and_is_as_wide_as_needed():
    ids = torch.tensor([[BOS, *IMAGE, *IMAGE, *IMAGE]])
    starts = torch.tensor([[1, 4, 7]])
    document_start = document_starts(ids, BOS)
    assert context_images(document_start, starts, "previous", 9).tolist() == [[-1], [0], [1]]
    assert context_images(document_start, starts, "all", 9).tolist() == [[-1, -1], [0, -1], [0, 1]]
    assert context_images(document_start, starts[:, :0], "all", 9).shape[0] == 0
    with pytest.raises(ValueError, match="'nearest'"):
        context_images(document_start, starts, "nearest", 9)


def test_targets_by_ids_are_text_eos_and_announced_image_starts():
    eos = 2
    ids = torch.tensor([[BOS, *IMAGE, WORD, *IMAGE, eos, BOS, WORD, PAD]])
    attention = torch.ones_like(ids)
    targets = text_targets(ids, attention, bos=BOS, pad=PAD, image_start=START, image=SLOT)
    counted = [i for i, counts in enumerate(targets[0].tolist()) if counts]
    assert counted == [4, 5, 8, 10]
    later = text_targets(ids, attention, bos=BOS, pad=PAD, image_start=START, image=SLOT, first_target=6)
    assert [i for i, counts in enumerate(later[0].tolist()) if counts] == [8, 10]


def test_each_row_may_count_from_a_place_of_its_own():
    ids = torch.full((2, 4), WORD)
    first = torch.tensor([[1], [3]])
    targets = text_targets(
        ids, torch.ones_like(ids), bos=BOS, pad=PAD, image_start=START, image=SLOT, first_target=first
    )
    assert targets.sum(1).tolist() == [3, 1]


@given(batch=batches())
def test_text_counts_after_an_image_if_its_document_has_begun_one(batch):
    ids, _ = batch
    counted = targets_after_an_image(ids, BOS, START)
    for row, row_counted in zip(ids.tolist(), counted.tolist(), strict=True):
        for i, counts in enumerate(row_counted):
            document = row[max(last_bos(row, i), 0) : i + 1]
            assert counts == (START in document)


def test_the_end_of_a_document_without_any_image_does_not_count_after_an_image():
    eos = 2
    ids = torch.tensor([[BOS, WORD, *IMAGE, WORD, eos, BOS, WORD, eos, BOS, WORD, START]])
    counted = targets_after_an_image(ids, BOS, START)[0].tolist()
    assert [i for i, counts in enumerate(counted) if counts] == [2, 3, 4, 5, 6, 12]


def test_an_image_is_announced_by_more_than_the_documents_start():
    ids = torch.tensor([[BOS, *IMAGE, WORD, *IMAGE, BOS, *IMAGE], [BOS, WORD, *IMAGE, *IMAGE, *[PAD] * 4]])
    starts = torch.tensor([[1, 5, 9], [2, 5, NO_IMAGE]])
    announced = announced_images(document_starts(ids, BOS), starts)
    assert announced.tolist() == [False, True, False, True, True]
    assert announced_images(document_starts(ids, BOS), starts[:, :0]).shape == (0,)


def test_a_label_is_the_next_token_where_that_counts():
    ids = torch.tensor([[BOS, 5, 6, BOS, 7]])
    counts = torch.tensor([[False, True, False, False, True]])
    assert next_token_labels(ids, counts).tolist() == [[5, IGNORED, IGNORED, 7, IGNORED]]
