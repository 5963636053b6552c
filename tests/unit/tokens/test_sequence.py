"""Documents to tokens: layout, what counts in the loss, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from test_vocabulary import hostile_text

from by_ids import text_targets
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError
from mm_interleaved.tokens.sequence import LearningRule, encode_document, slice_sequence

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


def decoded(ids, image_starts, vocabulary, images):
    """The parts that ids stand for: text between images, and the images. Special ids are left out.

    Two texts that touch come back as one; conversation markers come back as text.
    """
    parts, position = [], 0
    for start, image in zip([*map(int, image_starts), len(ids)], [*images, None], strict=True):
        text = vocabulary.decode(ids[position:start])
        parts += [Text(text)] if text else []
        parts += [] if image is None else [image]
        position = start + 1 + vocabulary.num_slots
    return tuple(parts)


@given(parts=parts)
def test_decoding_a_sequence_gives_the_documents_parts_back(byte_level_vocabulary, parts):
    sequence = encode_document(document(*parts), byte_level_vocabulary, eos=True)
    back = decoded(sequence.input_ids, sequence.image_starts, byte_level_vocabulary, sequence.images)
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


@given(parts=parts)
def test_what_counts_by_provenance_is_what_the_released_code_counts_by_ids(byte_level_vocabulary, parts):
    vocabulary = byte_level_vocabulary
    sequence = encode_document(document(*parts), vocabulary, eos=True)
    names = ("bos", "pad", "image_start", "image")
    special = {name: getattr(vocabulary, name) for name in names}
    ids = torch.from_numpy(sequence.input_ids)[None]
    by_ids = text_targets(ids, torch.ones_like(ids), **special)
    assert sequence.text_is_target.tolist() == by_ids[0].tolist()


@given(
    parts=st.lists(st.one_of(hostile_text.map(Text), st.sampled_from(PICTURES)), max_size=4),
    eos=st.booleans(),
)
def test_slices_at_the_borders_of_parts_are_the_documents_of_those_parts(vocabulary, parts, eos):
    parts = [part for part in parts if part != Text("")]
    sequence = encode_document(document(*parts), vocabulary, eos=eos)
    assert len(sequence.part_starts) == len(parts)
    for middle in range(len(parts)):
        border = sequence.part_starts[middle]
        front = slice_sequence(sequence, 0, border)
        back = slice_sequence(sequence, border, len(sequence), with_head=True)
        for piece, own in ((front, parts[:middle]), (back, parts[middle:])):
            alone = encode_document(document(*own), vocabulary, eos=eos and piece is back)
            assert piece.input_ids.tolist() == alone.input_ids.tolist()
            assert piece.image_starts.tolist() == alone.image_starts.tolist()
            assert piece.images == alone.images
            assert piece.text_is_target.tolist() == alone.text_is_target.tolist()
            assert piece.image_is_target.tolist() == alone.image_is_target.tolist()
            assert piece.part_starts.tolist() == alone.part_starts.tolist()


def test_the_second_half_without_bos_counts_neither_its_first_token_nor_an_image_there(vocabulary):
    sequence = encode_document(document(Text("Pip"), PICTURES[0], Text("Pip")), vocabulary)
    image, text = sequence.part_starts[1:]
    assert slice_sequence(sequence, image, len(sequence)).image_is_target.tolist() == [False]
    assert slice_sequence(sequence, image, len(sequence)).text_is_target[:5].tolist() == 4 * [False] + [True]
    assert not slice_sequence(sequence, text, len(sequence)).text_is_target[0]


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant", "user")])
def test_the_end_of_a_conversation_that_nobody_answered_does_not_count(vocabulary, roles):
    talk = document(*(Text("Pip", role=role) for role in roles))
    sequence = encode_document(talk, vocabulary, eos=True)
    assert sequence.input_ids[-1] == vocabulary.eos and not sequence.text_is_target[-1]


def counted(sequence, vocabulary):
    return sequence.input_ids[sequence.text_is_target].tolist(), sequence.image_is_target.tolist()


def test_a_learning_rule_says_which_text_and_which_images_count(vocabulary):
    words = vocabulary.encode_text("Pip")
    start, eos = vocabulary.image_start, vocabulary.eos
    parts = (Text("Pip"), PICTURES[0], Text("Pip"), PICTURES[1])

    def under(**rule):
        sequence = encode_document(document(*parts), vocabulary, eos=True, learn=LearningRule(**rule))
        return counted(sequence, vocabulary)

    assert under() == ([*words, start, *words, start, eos], [True, True])
    assert under(text="after_image") == ([start, *words, start, eos], [True, True])
    assert under(text="none", images="last") == ([], [False, True])
    assert under(images=(0,))[1] == under(images=(-2,))[1] == [True, False]
    assert under(images="none")[1] == [False, False]


def test_segmentation_to_image_trains_the_last_image_alone_because_its_record_says_so(vocabulary):
    pair = (PICTURES[0], Text("A room."), PICTURES[1])
    meta = {"learn": {"text": "none", "images": "last"}}
    sequence = encode_document(Document(id="d", parts=pair, meta=meta), vocabulary, learn=LearningRule())
    assert counted(sequence, vocabulary) == ([], [False, True])


@pytest.mark.parametrize(
    "learn, found",
    [
        ("all", "expected an object, found str"),
        ({"image": "all"}, "found 'image'"),
        ({"text": "some"}, "found 'some'"),
        ({"images": [0.5]}, "list of whole numbers, found"),
        ({"images": [True]}, "list of whole numbers, found"),
    ],
)
def test_a_wrong_learning_rule_is_refused_by_its_field(vocabulary, learn, found):
    with pytest.raises(InputError, match=found) as caught:
        encode_document(Document(id="d", parts=(Text("Pip"),), meta={"learn": learn}), vocabulary)
    assert caught.value.field == "meta.learn"
