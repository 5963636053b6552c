"""The figures about the world are counted, not claimed."""

from mm_interleaved.storyworld.world import SPLITS
from studies.census import (
    appearances,
    count_appearances,
    count_hero_stories,
    drawn_stories,
    fingerprint,
    variety,
)


def test_splits_share_out_all_appearances():
    everybody = appearances()
    assert len(set(everybody)) == len(everybody) == 8 * 8 * 4 * 25 * 16
    # One of eight colours a species is held out of training and validation.
    counts = {split: count_appearances(split) for split in SPLITS}
    assert 0.75 < counts["train"] / (len(everybody) * 7 / 8) < 0.85
    assert count_hero_stories("train") > 10**23


def test_no_story_comes_twice():
    found = variety(drawn_stories(300, seed=5))
    assert found.stories == found.scenes_and_texts == found.texts == 300
    assert found.images > 0.99 * found.all_images


def test_documents_have_the_same_bits_as_everywhere():
    # Made by `fingerprint(1, 0)`; a change of the world changes it, and every score with it.
    assert fingerprint(1, 0) == "55678de7406e88aca1ef3239937ca64638060d62984951669767a908a61f45f9"
