"""Rows, packing, padding, and the check of every slot by its provenance."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from by_ids import document_starts
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import SquareCrop
from mm_interleaved.errors import ModelFileError, TooLongError
from mm_interleaved.tokens.batch import blank_batch, check_fits, check_slots, collate, stack_batches
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.tokens.sequence import encode_document
from mm_interleaved.tokens.visibility import NO_IMAGE, visible_images

RED, BLUE = (Image(PILImage.new("RGB", (9, 5), colour)) for colour in ("red", "blue"))
words = st.sampled_from([Text("Pip finds a lamp."), Text("<|image|></s>"), RED, BLUE])
documents = st.lists(st.lists(words, max_size=4), min_size=1, max_size=5)


def encoded(vocabulary, *parts):
    return encode_document(Document(id="d", parts=parts), vocabulary)


def collated(rows, vocabulary, **settings):
    return collate(rows, vocabulary, SquareCrop(4), SquareCrop(8), **settings)


@given(documents=documents, side=st.sampled_from(["left", "right"]))
def test_a_row_of_a_batch_is_the_sequence_alone_moved_by_its_padding(byte_level_vocabulary, documents, side):
    vocabulary = byte_level_vocabulary
    sequences = [encoded(vocabulary, *parts) for parts in documents]
    batch = collated(sequences, vocabulary, padding_side=side)
    width = batch.input_ids.shape[1]
    for row, sequence in enumerate(sequences):
        first = width - len(sequence) if side == "left" else 0
        inside = slice(first, first + len(sequence))
        assert batch.input_ids[row, inside].tolist() == sequence.input_ids.tolist()
        assert batch.text_target[row, inside].tolist() == sequence.text_is_target.tolist()
        assert batch.position_ids[row, inside].tolist() == list(range(len(sequence)))
        assert batch.attention_mask[row].sum() == len(sequence)
        starts = [start for start in batch.image_start[row].tolist() if start != NO_IMAGE]
        assert starts == (sequence.image_starts + first).tolist()
        outside = ~batch.attention_mask[row]
        assert (batch.input_ids[row][outside] == vocabulary.pad).all()
        assert not batch.text_target[row][outside].any()
    assert not visible_images(batch.document_start, batch.image_start)[~batch.attention_mask].any()
    assert batch.num_images == sum(len(sequence.images) for sequence in sequences)


@given(documents=documents)
def test_packed_documents_see_what_they_see_alone(byte_level_vocabulary, documents):
    vocabulary = byte_level_vocabulary
    sequences = [encoded(vocabulary, *parts) for parts in documents]
    packed, alone = collated([sequences], vocabulary), collated(sequences, vocabulary)
    assert torch.equal(packed.document_start, document_starts(packed.input_ids, vocabulary.bos))
    packed_sees = visible_images(packed.document_start, packed.image_start)[0]
    alone_sees = visible_images(alone.document_start, alone.image_start)
    start = image = 0
    for row, sequence in enumerate(sequences):
        end, next_image = start + len(sequence), image + len(sequence.images)
        seen = alone_sees[row, : len(sequence), : len(sequence.images)]
        assert torch.equal(packed_sees[start:end, image:next_image], seen)
        assert packed_sees[start:end].sum() == seen.sum()
        assert packed.position_ids[0, start:end].tolist() == list(range(len(sequence)))
        start, image = end, next_image
    assert torch.equal(packed.pixel_values, alone.pixel_values)


def test_a_sequence_that_fits_no_row_is_refused_with_both_numbers(byte_level_vocabulary):
    long = encoded(byte_level_vocabulary, RED, BLUE)
    with pytest.raises(TooLongError, match="9 tokens, expected at most 8"):
        check_fits(long, max_length=8)
    with pytest.raises(TooLongError, match="2 images, expected at most 1"):
        check_fits(long, max_length=9, max_images=1)


@given(documents=documents, length=st.integers(0, 40))
def test_stacked_batches_are_one_batch_of_their_rows(byte_level_vocabulary, documents, length):
    vocabulary = byte_level_vocabulary
    rows = [[encoded(vocabulary, *parts)] for parts in documents]
    rows[0] = rows[0] * 2
    alone = [collated([row], vocabulary) for row in rows]
    together = collated(rows, vocabulary)
    nested = stack_batches([stack_batches(alone[:1], vocabulary.pad), *alone[1:]], vocabulary.pad)
    for stacked in (stack_batches(alone, vocabulary.pad), nested):
        for field in dataclasses.fields(together):
            assert torch.equal(getattr(stacked, field.name), getattr(together, field.name)), field.name
    longer = stack_batches([together, alone[0]], vocabulary.pad, length)
    assert longer.input_ids.shape == (len(rows) + 1, max(length, together.input_ids.shape[1]))
    check_slots(longer.input_ids, longer.image_start, vocabulary)
    assert not visible_images(longer.document_start, longer.image_start)[~longer.attention_mask].any()


def test_of_a_blank_batch_nothing_counts(byte_level_vocabulary):
    blank = blank_batch(byte_level_vocabulary, SquareCrop(4), SquareCrop(8))
    assert blank.num_images == 1 and not blank.text_target.any() and not blank.image_target.any()
    check_slots(blank.input_ids, blank.image_start, byte_level_vocabulary)
    text = collated([encoded(byte_level_vocabulary, Text("Pip"))], byte_level_vocabulary)
    assert stack_batches([text, blank], byte_level_vocabulary.pad).image_start.tolist() == [[NO_IMAGE], [1]]
    with pytest.raises(ValueError, match="in all batches or in none"):
        stack_batches([text, blank_batch(byte_level_vocabulary, SquareCrop(4))], byte_level_vocabulary.pad)


@pytest.mark.parametrize("damage", ["extra slot", "lost slot", "moved", "extra start", "cut"])
def test_slots_are_checked_by_provenance_and_not_by_count(byte_level_vocabulary, damage):
    vocabulary = byte_level_vocabulary
    batch = collated([encoded(vocabulary, Text("Pip"), RED, Text("lamp"), BLUE)], vocabulary)
    ids, starts = batch.input_ids.clone(), batch.image_start.clone()
    check_slots(ids, starts, vocabulary)
    first = int(starts[0, 0])
    if damage in ("extra slot", "moved"):
        ids[0, first - 1] = vocabulary.image
    if damage in ("lost slot", "moved"):
        ids[0, first + 2] = vocabulary.pad
    if damage == "extra start":
        ids[0, first - 1] = vocabulary.image_start
    if damage == "cut":
        ids = ids[:, :-1]
    with pytest.raises(ValueError, match=r"slot table|slots inside"):
        check_slots(ids, starts, vocabulary)


def test_documents_without_images_make_a_batch(byte_level_vocabulary):
    batch = collated([encoded(byte_level_vocabulary, Text("Pip"))], byte_level_vocabulary)
    assert batch.image_start.shape == (1, 0)
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.target_pixel_values.shape == (0, 3, 8, 8)
    assert batch.image_target.dtype == torch.bool and batch.image_target.shape == (0,)


def test_pixels_are_in_range_and_in_row_major_order(byte_level_vocabulary):
    rows = [encoded(byte_level_vocabulary, RED, BLUE), encoded(byte_level_vocabulary, BLUE)]
    batch = collated(rows, byte_level_vocabulary)
    assert batch.pixel_values.dtype == torch.float32
    assert batch.pixel_values[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_moving_a_batch_changes_the_type_of_pixels_only(byte_level_vocabulary):
    batch = collated([encoded(byte_level_vocabulary, RED)], byte_level_vocabulary)
    moved = batch.to("cpu", torch.float16)
    assert moved.pixel_values.dtype == moved.target_pixel_values.dtype == torch.float16
    for field in dataclasses.fields(batch):
        if "pixel" not in field.name:
            assert torch.equal(getattr(moved, field.name), getattr(batch, field.name))


def test_an_empty_batch_or_an_unknown_side_is_refused(byte_level_vocabulary):
    with pytest.raises(ValueError, match="at least one sequence"):
        collated([], byte_level_vocabulary)
    with pytest.raises(ValueError, match="'middle'"):
        collated([encoded(byte_level_vocabulary)], byte_level_vocabulary, padding_side="middle")


@pytest.mark.parametrize("tokenizer", ["byte_level_tokenizer", "llama_tokenizer"])
def test_a_saved_processor_makes_the_same_batch(tokenizer, request, tmp_path):
    tokenizer = request.getfixturevalue(tokenizer)
    known = tokenizer.get_vocab()
    special = {"image_start": known["<|beginofimage|>"], "image": known["<|image|>"]}
    special |= {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": 300}
    processor = MMInterleavedProcessor(tokenizer, 4, 8, 3, special_ids=special)
    # A model's configuration lies in the same folder.
    (tmp_path / "config.json").write_text('{"model_type": "mm_interleaved"}')
    processor.save_pretrained(tmp_path)
    again = MMInterleavedProcessor.from_pretrained(tmp_path)
    document = Document(id="d", parts=(Text(" a </s> lamp"), RED, Text("é")), target=(Text("seven"),))
    settings = {"eos": True, "include_target": True, "target_pixels": True}
    first, second = processor(document, **settings), again([document], **settings)
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name
    assert again.to_dict() == processor.to_dict()


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="there is no such file"):
        MMInterleavedProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"processor_config\.json:1:2: not JSON"):
        MMInterleavedProcessor.from_pretrained(tmp_path)


def test_a_wrong_processor_setting_names_its_file(byte_level_tokenizer, tmp_path):
    MMInterleavedProcessor(byte_level_tokenizer, 4, None, 3).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace('"released"', '"nearest"'))
    with pytest.raises(ModelFileError, match=r"processor_config.json.*'nearest'"):
        MMInterleavedProcessor.from_pretrained(tmp_path)


def test_a_model_that_does_not_paint_makes_no_target_pixels(byte_level_tokenizer):
    processor = MMInterleavedProcessor(byte_level_tokenizer, 4, None, 3)
    document = Document(id="d", parts=(RED,))
    assert processor(document).target_pixel_values is None
    with pytest.raises(ValueError, match="no target_size"):
        processor(document, target_pixels=True)
    assert np.isfinite(processor(document).pixel_values.numpy()).all()
