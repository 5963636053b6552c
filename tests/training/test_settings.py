"""Settings of a run: what `--set` takes and what it refuses."""

import dataclasses
import json
import subprocess
import sys
import typing
from dataclasses import replace

import pytest

from line_stage import CONFIG, Line
from mm_interleaved.errors import MMInterleavedError, StorageError, UsageError
from mm_interleaved.recipes.registry import RECIPES
from mm_interleaved.recipes.run import run_recipe
from mm_interleaved.recipes.storyworld.recipe import StoryWorldConfig
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.typed_settings import (
    Range,
    flat_record,
    from_record,
    limits,
    override,
    setting_names,
    to_record,
)
from studies.recipes import STUDY_RECIPES

ALL_RECIPES = {**RECIPES, **STUDY_RECIPES}


def number_ranges(kind):
    """The range of each numeric setting of a dataclass, by name."""
    return {name: limit for name, limit in limits(kind).items() if isinstance(limit, Range)}


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
    with pytest.raises(UsageError, match="did you mean 'storyworld'"):
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


def groups(settings, prefix=""):
    """(the name it has in --set, dataclass) of a recipe's settings and all groups in them."""
    yield prefix, settings
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        inner = value if isinstance(value, typing.Mapping) else {"": value}
        for name, group in inner.items():
            if dataclasses.is_dataclass(group):
                yield from groups(group, f"{prefix}{field.name}.{name}{'.' if name else ''}")


def numeric(kind):
    """The numeric settings of a dataclass: a number, one or none, or several."""
    hints = typing.get_type_hints(kind)
    return {
        name: hint for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["storyworld", "ablation", "scaling", "pretrain", "storytelling-lora"])
def test_every_number_has_a_range_and_what_lies_outside_is_refused(recipe):
    settings = ALL_RECIPES[recipe].settings()
    tried = 0
    for prefix, group in groups(settings):
        kinds, ranges = numeric(type(group)), number_ranges(type(group))
        assert kinds.keys() == ranges.keys(), f"{prefix}: {kinds.keys() ^ ranges.keys()}"
        for name, wanted in ranges.items():
            outside = [wanted.low - 1, wanted.high + max(1, wanted.high / 1000)]
            is_whole = int in {kinds[name], *typing.get_args(kinds[name])}
            words = [str(int(value)) for value in outside] if is_whole else map(str, outside)
            for word in [*words, *([] if is_whole else ["nan", "inf", "-inf", "1e38", "1e308", "-1e-300"])]:
                if float(word) in wanted:
                    continue
                with pytest.raises(UsageError, match=rf"^{prefix}{name} must .*, found "):
                    override(settings, [f"{prefix}{name}={word}"])
                tried += 1
    assert tried > 100


@pytest.mark.parametrize("name", sorted(number_ranges(StageConfig)))
def test_a_stage_at_the_ends_of_a_range_ends_as_it_should(tmp_path, name):
    """With a sentence, if not well; nothing overflows in a library."""
    wanted = number_ranges(StageConfig)[name]
    for value in (wanted.low, wanted.high if not wanted.excludes_high else 1 - 1e-9):
        if (name, value) == ("steps", wanted.high):
            continue  # a run without end
        kind = type(getattr(CONFIG, name))
        for optimizer in ("adamw", "muon"):
            config = replace(CONFIG, optimizer=optimizer, **{name: kind(value)})
            try:
                train_stage(Line(), config, tmp_path / f"{value}-{optimizer}", seed=2**63 - 1)
            except MMInterleavedError as error:
                assert error.exit_code == 5, error


@pytest.mark.parametrize(
    ("recipe", "assignment", "message"),
    [
        ("grounding", "steps=5", r"did you mean training\.steps\?"),
        ("grounding", "training.step=5", r"did you mean training\.steps\?"),
        ("grounding", "training.global_batch_size=4", r"did you mean global_batch_size\?"),
        (
            "storyworld",
            "steps=5",
            r"vae\.steps, vision\.steps, text\.steps, looking\.steps or unet\.steps \.\.\.\?",
        ),
        ("storyworld", "training.steps=5", r"did you mean vae\.steps, .* or unet\.steps \.\.\.\?"),
        ("grounding", "learning_rate=1", r"did you mean training\.learning_rate, .* \.\.\.\?"),
        ("grounding", "zzz=1", r"known are start_from, seed, .*, training, "),
        ("grounding", "training.lr=1", r"no such setting; "),
        (
            "grounding",
            "training.learning_rate=1e38",
            r"^training\.learning_rate must be at most 1000, found 1e\+38",
        ),
        ("grounding", "corpora.refcoco.weight=1e300", r"^corpora\.refcoco\.weight must be at most"),
        ("scaling", "widths=64,0", r"^widths must be 1 or more, found 0"),
        ("ablation", "variants=nobody", r"^variants: found 'nobody', expected some of "),
        ("grounding", "seed=" + "9" * 5000, r"seed: expected int, found '9+"),
    ],
)
def test_what_is_refused_is_named_as_it_is_set(recipe, assignment, message):
    with pytest.raises(UsageError, match=message) as refused:
        override(ALL_RECIPES[recipe].settings(), [assignment])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize("recipe", ["storyworld", "grounding-storyworld"])
def test_settings_of_another_form_are_refused_in_one_sentence(recipe):
    """Every value of a record replaced by one of another kind, and left out."""
    settings = ALL_RECIPES[recipe].settings()
    for name in flat_record(settings):
        for wrong in ({}, [], [[]], "x", 1.5, True, None, ...):
            record = json.loads(json.dumps(to_record(settings)))
            *above, last = name.split(".")
            place = record
            for key in above:
                place = place[key]
            if wrong is ...:
                del place[last]
            else:
                place[last] = wrong
            try:
                from_record(type(settings), record)
            except UsageError as error:
                assert last in str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["grounding-storyworld", "--set", "steps=5"],
        ["storyworld", "--set", "text.learning_rate=1e38"],
        ["storyword"],
        ["storyworld", "--resume", "-o", "nowhere"],
    ],
)
def test_what_is_wrong_with_a_command_is_said_before_anything_heavy_is_loaded(arguments, tmp_path):
    program = (
        "import sys; from mm_interleaved.cli.main import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
