"""The oracle reads every attribute back, from clean images and from slightly damaged ones."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFilter

from mm_interleaved.storyworld.oracle import (
    FIGURE_ATTRIBUTES,
    SETTING_ATTRIBUTES,
    attribute_matches,
    read_scene,
)
from mm_interleaved.storyworld.renderer import render_scene, scene_at
from mm_interleaved.storyworld.world import Scene


def _rates(damage, count):
    """Share of right readings for each attribute over `count` scenes of the train and test splits."""
    right, total = Counter(), Counter()
    for index in range(count):
        scene = scene_at(("train", "test")[index % 2], 12, index)
        reading = read_scene(damage(render_scene(scene), index))
        pairs = [(name, getattr(reading, name), getattr(scene, name)) for name in SETTING_ATTRIBUTES]
        pairs.append(
            ("positions", {f.position for f in reading.figures}, {f.position for f in scene.figures})
        )
        pairs.append(("props", set(reading.props), set(scene.props)))
        for figure in scene.figures:
            found = reading.figure_at(figure.position)
            for name in FIGURE_ATTRIBUTES:
                wanted = figure.action if name == "action" else getattr(figure.character, name)
                pairs.append((name, getattr(found, name, None), wanted))
        for name, found, wanted in pairs:
            right[name] += found == wanted
            total[name] += 1
    return {name: right[name] / total[name] for name in total}


def test_clean_images_are_read_right():
    rates = _rates(lambda pixels, index: pixels, 120)
    assert min(rates.values()) >= 0.995, rates


def test_noise_does_not_matter():
    def noisy(pixels, index):
        noise = np.random.default_rng(index).normal(0, 20, pixels.shape)
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)

    rates = _rates(noisy, 40)
    assert min(rates.values()) >= 0.97, rates


def test_a_slight_blur_does_not_matter():
    def blurred(pixels, index):
        return PILImage.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.5))

    rates = _rates(blurred, 40)
    assert min(rates.values()) >= 0.97, rates


def test_a_clean_image_matches_what_was_read_and_noise_matches_nothing():
    scene = scene_at("train", 13, 0)
    assert read_scene(render_scene(scene)).match == pytest.approx(1.0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert read_scene(noise).match < 0.5


def test_confidence_falls_as_the_image_gets_worse():
    pixels = render_scene(scene_at("train", 13, 1))
    blurred = np.asarray(PILImage.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7)))
    clean, damaged = read_scene(pixels).figures[0], read_scene(blurred).figures[0]
    assert damaged.confidence["badge"] < clean.confidence["badge"]


def test_larger_images_are_scaled_down():
    scene = scene_at("train", 13, 2)
    large = PILImage.fromarray(render_scene(scene)).resize((128, 128), PILImage.Resampling.NEAREST)
    assert all(attribute_matches(read_scene(large), scene, badges=True))


def test_an_empty_image_holds_nobody():
    reading = read_scene(render_scene(Scene(place="town", time="night", weather="snowy")))
    assert (reading.figures, reading.props) == ((), ())
    assert (reading.place, reading.time, reading.weather) == ("town", "night", "snowy")


def test_what_is_too_many_counts_as_wrong():
    full = scene_at("train", 13, 3)
    empty = Scene(place=full.place, time=full.time, weather=full.weather)
    matches = attribute_matches(read_scene(render_scene(full)), empty)
    assert matches == [True] * 3 + [False] * (len(full.figures) + len(full.props))


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        read_scene(np.zeros((32, 32, 3), np.uint8))
