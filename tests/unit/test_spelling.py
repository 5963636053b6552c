"""A wrong name leads to the right one, whatever it is the name of."""

from __future__ import annotations

import pytest
import typer

from mm_interleaved.cli.main import create_app
from mm_interleaved.data.registry import SOURCES
from mm_interleaved.generation.settings import SCHEDULERS, GenerationSettings
from mm_interleaved.spelling import _OTHERS_SAY, hint, nearest
from mm_interleaved.storyworld.exports import EXPORTS

SETTINGS = tuple(GenerationSettings().to_dict())
APP = typer.main.get_command(create_app())
COMMANDS = tuple(APP.commands)
FLAGS = tuple(name for each in APP.commands["generate"].params for name in each.opts)
NUMBERS = ("auto", "float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("wrong", "known", "right"),
    [
        ("num_steps", SETTINGS, "num_inference_steps"),
        ("steps", SETTINGS, "num_inference_steps"),
        ("stepps", SETTINGS, "num_inference_steps"),
        ("NumInferenceSteps", SETTINGS, "num_inference_steps"),
        ("cfg", SETTINGS, "guidance_scale"),
        ("max_tokens", SETTINGS, "max_new_tokens"),
        ("sampler", SETTINGS, "scheduler"),
        ("--steps", FLAGS, "--num-inference-steps"),
        ("--num_inference_steps", FLAGS, "--num-inference-steps"),
        ("--output-dir", FLAGS, "--output"),
        ("--ckpt", FLAGS, "--model"),
        ("dpm++", SCHEDULERS, "dpm-solver++"),
        ("DPM", SCHEDULERS, "dpm-solver++"),
        ("dimm", SCHEDULERS, "ddim"),
        ("DDIMScheduler", SCHEDULERS, "ddim"),
        ("fp16", NUMBERS, "float16"),
        ("bf16", NUMBERS, "bfloat16"),
        ("generat", COMMANDS, "generate"),
        ("paint", COMMANDS, "draw"),
        ("finetune", COMMANDS, "train"),
        ("coco", SOURCES, "captions"),
        ("captions", EXPORTS, "coco"),
        ("mmc5", SOURCES, "mmc4"),
        ("wds", SOURCES, "webdataset"),
        ("val", ("train", "validation", "test"), "validation"),
    ],
)
def test_the_right_name_is_found(wrong, known, right):
    assert nearest(wrong, known) == right


@pytest.mark.parametrize("known", [SETTINGS, FLAGS, COMMANDS, SCHEDULERS, tuple(SOURCES), tuple(EXPORTS)])
def test_every_name_is_nearest_to_itself(known):
    assert all(nearest(name, known) == name for name in known)
    assert all(nearest(name.upper(), known) == name for name in known if not name.startswith("-"))


@pytest.mark.parametrize("wrong", ["", "-", "?", "zzzzqqqq"])
def test_a_name_that_is_near_to_nothing_gets_the_list(wrong):
    assert nearest(wrong, SCHEDULERS) is None
    assert hint(wrong, SCHEDULERS) == f"expected one of {', '.join(SCHEDULERS)}"


def test_names_of_others_are_of_things_that_exist():
    parts = {each.name for command in APP.commands.values() for each in command.params}
    data = set(APP.commands["data"].commands)
    real = {*parts, *SETTINGS, *COMMANDS, *data, *SCHEDULERS, *NUMBERS, *SOURCES, *EXPORTS}
    real |= {"cuda", "mps", "nf4", "int8", "test", "validation", "set", "quit", "new", "help"}
    assert sorted(set(_OTHERS_SAY) - real) == []
