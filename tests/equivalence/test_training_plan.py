"""What the plan of a training run counts agrees with what training does."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved.cli.main import run
from mm_interleaved.errors import UsageError
from mm_interleaved.training.parameter_groups import PartConfig, PartsConfig, choose_trained
from mm_interleaved.training.plan import GPUS, frozen_names, plan_lines, training_needs
from tiny import image_ids, tiny_model

TOKENS, IMAGES = 40, 3


@pytest.fixture(scope="module")
def model():
    return tiny_model(compat="released", context_images="previous")


@pytest.fixture(scope="module")
def needs(model):
    config = json.loads(model.config.to_json_string(use_diff=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return training_needs(config, shapes, tokens=TOKENS, images=IMAGES)


def test_the_parts_that_the_plan_leaves_as_they_are_are_those_of_the_recipe(model):
    frozen = PartConfig()
    rules = choose_trained(model, PartsConfig(language=frozen, vision=frozen, vae=frozen, text_head=frozen))
    assert {name for name, _ in model.named_parameters()} - frozen_names(model) == set(rules)


def test_counted_operations_are_those_that_a_step_does(model, needs):
    choose_trained(model, PartsConfig())
    ids = [0]
    starts = []
    for _ in range(IMAGES):
        ids += [5] * 8
        starts.append(len(ids))
        ids += image_ids(model.config)
    ids += [5] * (TOKENS - len(ids))
    batch = {
        "input_ids": torch.tensor([ids]),
        "image_start": torch.tensor([starts]),
        "pixel_values": torch.rand(IMAGES, 3, 32, 32),
        "target_pixel_values": torch.rand(IMAGES, 3, 32, 32),
        "text_target": torch.ones(1, TOKENS, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted, done = needs.row.forward_flops, forward.get_total_flops()
    assert counted == pytest.approx(done, rel=0.25), counted / done
    # The plan computes the activations of layers again; here they were kept.
    assert 2.0 < needs.row.training_flops / counted < 4.0
    assert needs.row.training_flops > done + backward.get_total_flops() > 0.6 * needs.row.training_flops


def test_shares_take_less_memory_and_more_gpus_more_tokens(needs):
    for gpu in GPUS:
        by_strategy = {}
        for num_gpus in (8, 64, 128):
            for line in plan_lines(needs, gpu, num_gpus):
                by_strategy.setdefault(line.strategy, []).append(line)
        assert set(by_strategy) == {"ddp", "fsdp", "fsdp, hybrid"}
        memory = {strategy: [line.memory for line in lines] for strategy, lines in by_strategy.items()}
        assert memory["ddp"][0] == memory["ddp"][2] > memory["fsdp"][0] >= memory["fsdp"][2]
        for lines in by_strategy.values():
            # From one node to several the network comes between; from there on, more is more.
            assert lines[-2].tokens_a_second < lines[-1].tokens_a_second < 2.01 * lines[-2].tokens_a_second


@pytest.mark.parametrize("num_gpus", [0, -1])
def test_a_plan_for_no_gpu_is_refused(needs, num_gpus):
    with pytest.raises(UsageError, match=f"GPUs: found {num_gpus}"):
        next(plan_lines(needs, GPUS[0], num_gpus))
    assert run(["plan", "storyworld", "--gpus", str(num_gpus)]) == 2
