"""Layouts: what is wanted, and how tokens are shared."""

import pytest

from mm_interleaved.errors import UsageError
from mm_interleaved.generation.layout import parse_layout, text_share
from mm_interleaved.generation.settings import GenerationSettings


def test_auto_leaves_the_choice_to_the_model():
    assert parse_layout("auto") is None


def test_parts_are_read_in_order():
    assert parse_layout(" T I  T ") == ("T", "I", "T")


@pytest.mark.parametrize(
    ("layout", "named"),
    [("T X I", "'X' as part 2"), ("TI", "'TI' as part 1"), ("t", "'t'"), (" ", "no part")],
)
def test_a_wrong_layout_is_refused_and_the_word_named(layout, named):
    with pytest.raises(UsageError, match=named):
        GenerationSettings(layout=layout)


def test_more_texts_than_tokens_are_refused():
    with pytest.raises(UsageError, match="max_new_tokens = 2"):
        GenerationSettings(layout="T I T T", max_new_tokens=2)


def test_texts_share_what_the_images_leave():
    assert text_share(("T", "I", "T"), budget=100, room=24, image_tokens=4) == 10
    assert text_share(("T", "I", "T"), budget=8, room=24, image_tokens=4) == 4
    assert text_share(("T",), budget=100, room=24, image_tokens=4) == 24


def test_a_text_gets_a_token_as_long_as_one_fits():
    assert text_share(("T", "I"), budget=100, room=3, image_tokens=4) == 1
    assert text_share(("T", "I"), budget=100, room=0, image_tokens=4) == 0
