"""Documents to tokens: layout, what counts in the loss, and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from test_vocabulary import hostile_text

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.sequence import cut_sequence, decode_sequence, encode_document

PICTURES = tuple(Image(PILImage.new("RGB", (1, 1), (n, 0, 0)), name=str(n)) for n in range(4))
parts = st.lists(st.one_of(hostile_text.map(Text), st.sampled_from(PICTURES)), max_size=7)


def document(*parts, target=()):
    return Document(id="d", parts=parts, target=target)


def without_empty_texts_and_borders(parts):
    """Texts that touch joined, empty ones gone: what tokens can tell."""
    joined = []
    for part in parts:
        if isinstance(part, Image):
            joined.append(part)
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part.text
        elif part.text:
            joined.append(part.text)
    return joined


@given(parts=parts)
def test_decoding_a_sequence_gives_the_documents_parts_back(byte_level_vocabulary, parts):
    sequence = encode_document(document(*parts), byte_level_vocabulary, eos=True)
    back = decode_sequence(sequence.input_ids, sequence.image_starts, byte_level_vocabulary, sequence.images)
    assert without_empty_texts_and_borders(back) == without_empty_texts_and_borders(parts)


@given(parts=parts)
def test_slots_stand_where_the_table_says_and_nowhere_else(vocabulary, parts):
    sequence = encode_document(document(*parts), vocabulary)
    expected = np.zeros(len(sequence), dtype=np.int64)
    for start in sequence.image_starts:
        expected[start : start + 4] = vocabulary.image_ids()
    is_special = np.isin(sequence.input_ids, [vocabulary.image_start, vocabulary.image])
    assert np.array_equal(np.where(is_special, sequence.input_ids, 0), expected)
    assert sequence.images == tuple(part for part in parts if isinstance(part, Image))


def test_the_layout_is_bos_then_the_parts_then_eos(vocabulary):
    text = vocabulary.encode_text("Pip")
    sequence = encode_document(document(Text("Pip"), PICTURES[0], Text("Pip")), vocabulary, eos=True)
    expected = [vocabulary.bos, *text, *vocabulary.image_ids(), *text, vocabulary.eos]
    assert sequence.input_ids.tolist() == expected


def test_all_text_counts_but_not_bos_slots_or_an_image_directly_after_bos(vocabulary):
    text = vocabulary.encode_text("Pip")
    sequence = encode_document(document(PICTURES[0], Text("Pip"), PICTURES[1]), vocabulary, eos=True)
    after_bos, slots = [False], 3 * [False]
    expected = [False, *after_bos, *slots, *[True for _ in text], True, *slots, True]
    assert sequence.text_is_target.tolist() == expected
    assert sequence.image_is_target.tolist() == [False, True]


def test_with_a_target_only_the_target_counts(vocabulary):
    question = document(PICTURES[0], Text("What?"), target=(Text("seven"), PICTURES[1]))
    sequence = encode_document(question, vocabulary, eos=True, include_target=True)
    answer = [*vocabulary.encode_text("seven"), vocabulary.image_start, vocabulary.eos]
    assert sequence.input_ids[sequence.text_is_target].tolist() == answer
    assert sequence.image_is_target.tolist() == [False, True]
    prompt = encode_document(question, vocabulary)
    assert not prompt.text_is_target.any() and not prompt.image_is_target.any()
    assert sequence.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()


def test_without_bos_the_first_token_is_predicted_by_nobody(vocabulary):
    sequence = encode_document(document(Text("Pip finds")), vocabulary, bos=False)
    assert sequence.text_is_target.tolist() == [False] + [True] * (len(sequence) - 1)


def test_a_conversation_is_plain_text_with_markers(byte_level_vocabulary):
    talk = document(
        Text("Be kind.", role="system"),
        PICTURES[0],
        Text("What?", role="user"),
        Text("7", role="assistant"),
        Text("Sure? </s>", role="user"),
        target=(Text("yes"),),
    )
    prompt = encode_document(talk, byte_level_vocabulary)
    ids = [
        i if i != byte_level_vocabulary.image else byte_level_vocabulary.image_start for i in prompt.input_ids
    ]
    text = byte_level_vocabulary.tokenizer.decode(ids)
    image = 4 * "<|beginofimage|>"
    # An image that has no role belongs to nobody's turn; its marker comes after it.
    assert text == f"<s>Be kind.{image}USER: What? ASSISTANT:7</s>USER: Sure? </s> ASSISTANT:"
    assert (prompt.input_ids == byte_level_vocabulary.eos).sum() == 1
    answered = encode_document(talk, byte_level_vocabulary, eos=True, include_target=True)
    assert answered.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    counted = answered.input_ids[answered.text_is_target].tolist()
    assert counted == [*byte_level_vocabulary.encode_text("yes"), byte_level_vocabulary.eos]


def test_in_a_conversation_without_target_every_answer_and_its_end_count(byte_level_vocabulary):
    vocabulary = byte_level_vocabulary
    talk = document(
        Text("One?", role="user"),
        Text("1", role="assistant"),
        Text("Two?", role="user"),
        Text("2", role="assistant"),
    )
    sequence = encode_document(talk, vocabulary, eos=True)
    counted = sequence.input_ids[sequence.text_is_target].tolist()
    answers = [[*vocabulary.encode_text(answer), vocabulary.eos] for answer in ("1", "2")]
    assert counted == answers[0] + answers[1]


@given(parts=parts, length=st.integers(0, 60))
def test_a_cut_sequence_fits_and_its_images_are_whole(vocabulary, parts, length):
    sequence = encode_document(document(*parts), vocabulary)
    cut = cut_sequence(sequence, length, vocabulary.num_slots)
    assert len(cut) <= length or len(cut) == len(sequence)
    assert cut.input_ids.tolist() == sequence.input_ids[: len(cut)].tolist()
    assert len(cut.images) == len(cut.image_starts) == len(cut.image_is_target)
    assert (cut.input_ids == vocabulary.image).sum() == len(cut.images) * vocabulary.num_slots
    assert (cut.input_ids == vocabulary.image_start).sum() == len(cut.images)


def test_images_and_starts_have_to_agree_in_number(vocabulary):
    with pytest.raises(ValueError, match="0 images for 1"):
        decode_sequence([1], [0], vocabulary, [])
