"""Spoilt stories: their truth falls with what was spoilt, and pure scores rank them as the truth does."""

import random

import numpy as np
import pytest

from mm_interleaved.storyworld.tasks import document
from studies.judge_free import SPOILT, agreements


class BlindReader:
    """Reads nothing: every image has the same caption, and goes as well with every text."""

    def captions(self, images):
        return ["nothing"] * len(images)

    def agreements(self, texts, images, captions):
        return [-1.0] * len(texts)

    def likeness(self, images, captions):
        return 1.0


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_more_is_worth_less(name):
    spoil, _ = SPOILT[name]
    stories = [document("test", 0, index, "story") for index in range(6)]
    truths = [
        np.mean([spoil(story, stories, degree, random.Random(1)).truth for story in stories])
        for degree in (0.0, 0.5, 1.0)
    ]
    assert truths[0] == 1.0 and truths[0] > truths[1] > truths[2]


def test_scores_that_read_no_image_rank_stories_as_the_truth_does(monkeypatch):
    pure = {name: SPOILT[name] for name in ("structure", "image_count", "copy_rate", "repetition")}
    monkeypatch.setattr("studies.judge_free.SPOILT", pure)
    found = {one.score: one.correlation for one in agreements(BlindReader(), 20)}
    assert found.keys() == pure.keys() and min(found.values()) > 0.8
