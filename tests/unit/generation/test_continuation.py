"""Layouts: what is wanted, and how tokens are shared."""

import pytest

from mm_interleaved.documents.layout import canonical_layout, parse_layout
from mm_interleaved.errors import UsageError
from mm_interleaved.generation.continuation import text_share
from mm_interleaved.generation.settings import GenerationSettings


@pytest.mark.parametrize("layout", ["auto", "AUTO", " auto "])
def test_auto_leaves_the_choice_to_the_model(layout):
    assert parse_layout(layout) is None and canonical_layout(layout) == "auto"


@pytest.mark.parametrize("layout", [" T I  T ", "TIT", "tit", "t,i,t", "T, I, T", "text image text", "T It"])
def test_parts_are_read_in_order_however_they_are_spelt(layout):
    assert parse_layout(layout) == ("T", "I", "T")
    assert GenerationSettings(layout=layout).layout == canonical_layout(layout) == "T I T"


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ("T X I", "'X' as part 2"),
        ("TIP", "'TIP' as part 1"),
        ("T I texts", "'texts' as part 3"),
        (" ", "no part"),
    ],
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
