"""The world, its images and stories: the same everywhere, split by rule, silent about badges."""

import hashlib
from itertools import combinations, pairwise

import numpy as np
import pytest

from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.language import (
    describe_scene,
    read_actions,
    read_figures,
    read_introductions,
    read_props,
    read_setting,
)
from mm_interleaved.storyworld.renderer import render_batch, render_scene, scene_at
from mm_interleaved.storyworld.sprites import glyph
from mm_interleaved.storyworld.stories import story
from mm_interleaved.storyworld.world import (
    BADGES,
    BODY_COLOURS,
    PATTERNS,
    SPECIES,
    SPLITS,
    Scene,
    is_held_out,
    scene_from_record,
    scene_to_record,
    split_of,
)


def test_the_same_images_come_out_on_every_machine():
    # Made by this very line; it changes exactly when the drawings or the choices change.
    digest = hashlib.sha256(render_batch(seed=7, start=0, count=32).tobytes()).hexdigest()
    assert digest == "5afa5608dcc817983d33fc268925bd7ef3ab77a55bf99495798454a536109908"


def test_dice_are_a_function_of_their_seeds():
    assert [SeededRandom(1, 2).below(100) for _ in range(3)] == [SeededRandom(1, 2).below(100)] * 3
    rolls, others = SeededRandom(1, 2), SeededRandom(2, 1)
    assert [rolls.below(10**6) for _ in range(5)] != [others.below(10**6) for _ in range(5)]
    with pytest.raises(ValueError, match="-1"):
        SeededRandom(-1)


def test_dice_cover_a_range_evenly_past_the_first_refill():
    rng = SeededRandom(5)
    counts = np.bincount([rng.below(4) for _ in range(4000)], minlength=4)
    assert counts.sum() == 4000 and counts.min() > 850


def test_a_batch_holds_the_images_of_its_scenes():
    batch = render_batch(seed=3, start=5, count=4, split="test")
    for offset, image in enumerate(batch):
        assert np.array_equal(image, render_scene(scene_at("test", 3, 5 + offset)))


def test_badges_are_far_apart():
    distances = {pair: int((glyph(pair[0]) != glyph(pair[1])).sum()) for pair in combinations(BADGES, 2)}
    closest = min(distances, key=distances.__getitem__)
    assert len(BADGES) == 16
    assert distances[closest] >= 10, f"{closest} differ in {distances[closest]} of 35 cells"


def test_no_image_of_one_split_occurs_in_another():
    for split in SPLITS:
        for index in range(100):
            characters = [figure.character for figure in scene_at(split, 0, index).figures]
            characters += story(split, 1, index).cast
            assert all(split_of(character) == split for character in characters)


def test_held_out_combinations_appear_in_the_test_split_only():
    held_out = [
        (species, colour) for species in SPECIES for colour in BODY_COLOURS if is_held_out(species, colour)
    ]
    assert len(held_out) == len(SPECIES)
    shares = {}
    for split in SPLITS:
        casts = [story(split, 2, index).cast for index in range(300)]
        shares[split] = np.mean([any(is_held_out(c.species, c.body_colour) for c in cast) for cast in casts])
    assert shares["train"] == shares["validation"] == 0
    assert 0.15 < shares["test"] < 0.35


def test_a_scene_survives_its_record():
    for index in range(20):
        scene = scene_at("validation", 4, index)
        assert scene_from_record(scene_to_record(scene)) == scene


def test_a_position_is_taken_once():
    scene = next(scene for index in range(50) if len((scene := scene_at("train", 0, index)).figures) == 2)
    figure = scene.figures[0]
    with pytest.raises(ValueError, match="taken twice"):
        Scene(place="beach", time="day", weather="clear", figures=(figure, figure))


def test_captions_are_read_back_as_the_scene():
    for index in range(100):
        scene = scene_at("train", 6, index)
        text = describe_scene(scene)
        assert read_setting(text) == {"place": scene.place, "time": scene.time, "weather": scene.weather}
        said = {(f.position, f.subject, f.colour, f.hat, f.hat_colour, f.action) for f in read_figures(text)}
        assert said == {
            (
                f.position,
                f.character.species,
                f.character.body_colour,
                f.character.hat,
                f.character.hat_colour,
                f.action,
            )
            for f in scene.figures
        }
        assert {(p.position, p.subject, p.colour) for p in read_props(text)} == {
            (p.position, p.kind, p.colour) for p in scene.props
        }


def test_a_storys_texts_determine_its_scenes():
    for index in range(150):
        told = story("train", 8, index)
        setting: dict[str, str] = {}
        looks, colours = {}, {}
        for panel in told.panels:
            setting |= read_setting(panel.text)
            assert setting == {key: getattr(panel.scene, key) for key in ("place", "time", "weather")}, (
                panel.text
            )
            looks |= read_introductions(panel.text)
            said = {(name, a.position, a.action) for name, a in read_actions(panel.text).items()}
            assert said == {(f.character.name, f.position, f.action) for f in panel.scene.figures}, panel.text
            for figure in panel.scene.figures:
                look, character = looks[figure.character.name], figure.character
                assert (look.subject, look.colour) == (character.species, character.body_colour)
                assert (look.hat, look.hat_colour) == (character.hat, character.hat_colour)
            props = read_props(panel.text)
            colours |= {prop.subject: prop.colour for prop in props if prop.colour}
            assert {(p.subject, colours[p.subject], p.position) for p in props} == {
                (p.kind, p.colour, p.position) for p in panel.scene.props
            }


def test_texts_never_tell_badges_or_patterns():
    secrets = {"badge", *PATTERNS, *(badge for badge in BADGES if len(badge) > 1)}
    for index in range(200):
        texts = [panel.text for panel in story("test", 9, index).panels]
        texts.append(describe_scene(scene_at("test", 9, index)))
        for text in texts:
            words = set(text.lower().replace(".", " ").replace(",", " ").split())
            assert not words & secrets, text
            assert not any(character.isdigit() for character in text), text


def test_stories_have_three_to_six_panels_and_no_two_alike_in_a_row():
    lengths = set()
    for index in range(100):
        panels = story("train", 10, index).panels
        lengths.add(len(panels))
        for before, after in pairwise(panels):
            assert before.scene != after.scene
    assert lengths == {3, 4, 5, 6}


def test_sentences_agree_in_article_and_number():
    for index in range(200):
        for panel in story("train", 11, index).panels:
            words = panel.text.replace(".", "").replace(",", "").split()
            for article, word in pairwise(words):
                if article.lower() in ("a", "an"):
                    assert (article.lower() == "an") == (word[0] in "aeiou"), panel.text
            for line in panel.text.split(". "):
                assert line[0].isupper()
                assert (" go to" in line) == (" and " in line and " to the " in line), line


def test_a_word_that_is_no_split_is_refused():
    with pytest.raises(ValueError, match="'dev'"):
        story("dev", 0, 0)
