"""Settings of a run: what `--set` takes and what it refuses."""

import pytest

from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.recipes.storyworld import StoryWorldConfig
from mm_interleaved.training.run import RECIPES, run_recipe
from mm_interleaved.training.settings import override, setting_names


def test_assignments_reach_nested_settings_and_keep_their_types():
    config = override(
        StoryWorldConfig(),
        [
            "image.steps=7",
            "seed=3",
            "sizes.use_synchronizers=false",
            "sizes.unet_channels=32,64,64,64",
            "text.learning_rate=2e-4",
        ],
    )
    assert (config.image.steps, config.seed, config.sizes.use_synchronizers) == (7, 3, False)
    assert config.sizes.unet_channels == (32, 64, 64, 64) and config.text.learning_rate == 2e-4
    assert StoryWorldConfig().image.steps != 7


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("image.step=7", "did you mean image.steps"),
        ("imag.steps=7", "did you mean image.steps"),
        ("image=7", "no such setting"),
        ("image.steps", "expected name=value"),
        ("image.steps=many", "expected int, found 'many'"),
        ("image.steps=0", "steps"),
        ("image.ema_decay=1.5", "ema_decay"),
        ("image.learning_rate=-1", "learning_rate must be 0 or more, found -1"),
        ("image.learning_rate=nan", "learning_rate must be 0 or more, found nan"),
        ("image.warmup_steps=-3", "warmup_steps"),
        ("sizes.use_synchronizers=maybe", "expected bool"),
    ],
)
def test_what_cannot_be_set_is_refused_in_one_sentence(assignment, message):
    with pytest.raises(UsageError, match=message):
        override(StoryWorldConfig(), [assignment])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("num_threads=-2", "num_threads must be 0 or more"),
        ("num_workers=-1", "num_workers must be 0 or more"),
        ("seed=-2", "seed must be 0 or more"),
        ("max_length=0", "max_length must be 1 or more"),
        ("max_bad_fraction=7", r"max_bad_fraction must lie in \[0, 1\]"),
        ("samples.every=-1", "every must be 0 or more"),
        ("corpora.ground.weight=-1", "weight must be 0 or more"),
        ("corpora.ground.few_shot_share=2", r"few_shot_share must lie in \[0, 1\]"),
        ("parts.unet.learning_rate=-1", "learning_rate must be 0 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_is_loaded(assignment, message):
    with pytest.raises(UsageError, match=message):
        override(RECIPES["grounding-storyworld"].settings(), [assignment])


def test_what_must_not_stand_together_is_asked_of_the_result_alone():
    config = RECIPES["pretrain"].settings()
    half = override(config, ["training.use_float16=true", "training.use_bfloat16=false"])
    assert half.training.use_float16 and not half.training.use_bfloat16
    few = override(config, ["lora.quantize=nf4", "lora.rank=4", "lora.rank=8"])
    assert (few.lora.quantize, few.lora.rank) == ("nf4", 8)


def test_every_setting_is_listed():
    names = setting_names(StoryWorldConfig())
    assert {"seed", "vae.steps", "sizes.num_slots"} <= set(names)


def test_an_unknown_recipe_and_a_folder_in_use_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean storyworld"):
        run_recipe("storyword", out=tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        run_recipe("storyworld", out=tmp_path, resume=True)
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "log.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds a run already"):
        run_recipe("storyworld", out=tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        run_recipe("storyworld", out=tmp_path / ("a" * 300))
