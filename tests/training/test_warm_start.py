"""The recipe goes on from a finished model."""

import pytest
from safetensors import safe_open

from mm_interleaved.errors import ModelFileError
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.recipes.storyworld.recipe import StoryWorldConfig, train
from mm_interleaved.typed_settings import override

SHORT = ["num_threads=1", "text.steps=1", "unet.steps=1", "image.steps=1", "image_batch_size=2"]


def tensors(folder):
    read = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            read |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return read


@pytest.mark.slow
def test_a_run_that_starts_from_a_model_keeps_its_sight_and_trains_the_rest(tmp_path):
    config = override(StoryWorldConfig(), ["start_from=storyworld", *SHORT])
    before, after = tensors(find_model("storyworld")), tensors(train(config, tmp_path / "run"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not before[key].equal(after[key])}
    assert not any(
        key.startswith(("image_decoder.vae.", "vision.clip.", "vision.adapter.")) for key in changed
    )
    for part in ("language_model.", "text_head.", "image_decoder.unet.", "image_decoder.synchronizers."):
        assert any(key.startswith(part) for key in changed), part


def test_a_model_that_is_not_there_stops_the_run(tmp_path):
    with pytest.raises(ModelFileError, match="no such folder"):
        train(override(StoryWorldConfig(), ["start_from=nowhere", *SHORT]), tmp_path / "run")
