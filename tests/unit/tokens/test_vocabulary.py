"""Text stays text: round trips, and no special id out of anything that a user can type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.errors import InputError
from mm_interleaved.tokens.vocabulary import Vocabulary

HOSTILE = [
    "<|image|>",
    "<|beginofimage|>",
    "<|image|",
    "|image|>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<image>",
    "<0x0A>",
    "[INST]",
    "\u200b",
    "\u202e",
    "\0",
    "\r\n",
    " ",
    "é",
    "🜁",
    "\U0010fffe",
]
# U+2581 is how SentencePiece itself writes a space, so that kind of tokenizer reads it back as one.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
hostile_text = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(characters, max_size=6)), max_size=6).map(
    "".join
)


@given(text=hostile_text)
def test_decoding_what_was_encoded_gives_the_text_back(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode_text(text)) == text


@given(text=hostile_text)
def test_text_never_becomes_a_special_id(vocabulary, text):
    special = {vocabulary.image_start, vocabulary.image, vocabulary.bos, vocabulary.eos}
    assert special.isdisjoint(vocabulary.encode_text(text))


@pytest.mark.parametrize("special", HOSTILE[:8])
def test_the_spelling_of_a_special_token_is_cut_into_pieces(vocabulary, special):
    assert len(vocabulary.encode_text(f"a {special} b")) > 4


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d"])
def test_a_lone_surrogate_is_refused_with_its_place(vocabulary, text):
    with pytest.raises(InputError, match="lone surrogate U\\+D"):
        vocabulary.encode_text(text)


@pytest.mark.parametrize("text", ["a lamp", " a lamp", "  a lamp ", "   ", " "])
def test_leading_spaces_survive(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode_text(text)) == text


def test_a_text_has_the_ids_that_sentencepiece_gives_it(llama_vocabulary, llama_tokenizer):
    # A piece of text begins with the mark of a space, wherever it stands: "fresh", as after an image.
    tokens = llama_tokenizer.convert_ids_to_tokens(llama_vocabulary.encode_text("a lamp"))
    assert tokens[0].startswith("\u2581")
    assert llama_vocabulary.encode_text("") == []


def test_no_bos_or_eos_is_added(vocabulary):
    ids = vocabulary.encode_text("Pip")
    assert vocabulary.bos not in ids and vocabulary.eos not in ids


def test_special_ids_and_ids_beyond_the_tokenizer_are_left_out_of_text(vocabulary):
    ids = vocabulary.encode_text("lamp")
    noise = [vocabulary.bos, vocabulary.image_start, vocabulary.image, vocabulary.eos, 10**6, -1]
    assert vocabulary.decode([*noise, *ids, *noise]) == "lamp"


def test_a_padding_id_that_is_a_piece_of_text_still_reads_as_text(llama_vocabulary):
    piece = llama_vocabulary.tokenizer.decode([llama_vocabulary.pad])
    assert llama_vocabulary.decode([llama_vocabulary.pad]) == piece != ""


def test_special_ids_that_coincide_are_refused(byte_level_tokenizer):
    with pytest.raises(ValueError, match="different"):
        Vocabulary(byte_level_tokenizer, image_start=3, image=4, bos=1, eos=2, pad=2, num_slots=1)


def test_a_tokenizer_without_the_special_tokens_is_refused_by_name(byte_level_tokenizer):
    with pytest.raises(ValueError, match="no image token"):
        Vocabulary.from_tokenizer(byte_level_tokenizer, 1, image_token="<missing>")


def test_an_image_is_its_start_token_and_its_slots(vocabulary):
    assert vocabulary.image_ids() == [vocabulary.image_start] + 3 * [vocabulary.image]


@given(data=st.data())
def test_what_is_settled_of_a_text_stays_whatever_follows(vocabulary, data):
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=24))
    whole = vocabulary.decode(ids)
    settled = [vocabulary.decode_settled(ids[:end]) for end in range(len(ids) + 1)]
    for shorter, longer in zip(settled, [*settled[1:], whole], strict=True):
        assert longer.startswith(shorter)


def test_bytes_are_settled_when_their_run_is_over(llama_vocabulary):
    tokenizer = llama_vocabulary.tokenizer
    good, bad = (
        tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text])
        for text in (b"\xc3\xa9", b"\xe4")
    )
    [letter] = tokenizer.convert_tokens_to_ids(["a"])
    assert llama_vocabulary.decode_settled([letter, *good]) == "a"
    assert llama_vocabulary.decode_settled([letter, *good, letter]) == "a\u00e9a"
    assert llama_vocabulary.decode([letter, *good, *bad, letter]) == "a\ufffd\ufffd\ufffda"
