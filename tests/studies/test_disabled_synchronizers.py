"""A model without synchronizers has the weights of the whole one, and is what it is with closed gates."""

from __future__ import annotations

import pytest
import torch

from mm_interleaved import InterleavedGenerator, MMInterleavedProcessor
from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.storyworld.tasks import document
from studies.disabled_synchronizers import without_synchronizers, write_without_synchronizers

SHIPPED = find_model("storyworld")


@pytest.fixture(scope="module")
def whole():
    return load_model(SHIPPED, dtype="float32")


def test_weights_that_are_left_are_those_of_the_whole_model(whole):
    bare = without_synchronizers(whole)
    kept, all_weights = bare.state_dict(), whole.state_dict()
    assert all(torch.equal(value, all_weights[name]) for name, value in kept.items())
    left_out = all_weights.keys() - kept.keys()
    assert left_out and all("synchronizer" in name for name in left_out)
    assert bare.config.text_synchronizer is None and whole.config.text_synchronizer is not None


def test_one_side_can_be_disabled_alone(whole):
    text, image = (without_synchronizers(whole, (side,)) for side in ("language", "unet"))
    assert text.image_decoder.synchronizers is not None and image.image_decoder.synchronizers is None
    assert [any(isinstance(m, GatedSynchronizer) for m in model.modules()) for model in (text, image)] == [
        False,
        True,
    ]


def test_what_it_says_of_an_image_is_what_closed_gates_say(whole):
    question = document("test", 1, 2, "dialogue")
    processor = MMInterleavedProcessor.from_pretrained(SHIPPED)

    def scores_of(model):
        return InterleavedGenerator(model, processor).score_options(question, question.meta["candidates"])

    closed = load_model(SHIPPED, dtype="float32")
    for module in closed.modules():
        if isinstance(module, GatedSynchronizer):
            torch.nn.init.zeros_(module.gate)
    without = scores_of(without_synchronizers(whole))
    assert scores_of(closed) == pytest.approx(without, abs=1e-5)
    assert scores_of(whole) != pytest.approx(without, abs=1e-2)


def test_the_folder_is_a_model(tmp_path):
    out = tmp_path / "bare"
    number = write_without_synchronizers(SHIPPED, ("language", "unet"), out)
    bare = load_model(out)
    assert bare.config.image_synchronizer is None and bare.config.generation_settings
    assert number == load_model(SHIPPED).num_parameters() - bare.num_parameters() > 0
    assert (out / "known_words.txt").read_bytes() == (SHIPPED / "known_words.txt").read_bytes()
