"""What `plan` tells agrees with what a model does when it runs."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.cost import DEVICES, needs_of
from mm_interleaved.models.unet import unet_forward
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def config(model):
    return json.loads(model.config.to_json_string(use_diff=False))


@pytest.fixture(scope="module")
def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_counted_operations_of_a_picture_are_those_that_are_done(model, config, shapes):
    decoder = model.image_decoder
    steps, side = 4, config["unet_config"]["sample_size"]
    config = {**config, "generation_settings": {"num_inference_steps": steps}}
    latents = torch.randn(1, config["unet_config"]["in_channels"], side, side)
    conditioning = torch.randn(1, 5, config["unet_config"]["cross_attention_dim"])
    with FlopCounterMode(display=False) as step:
        unet_forward(decoder.unet, latents, torch.tensor([3]), conditioning)
    with FlopCounterMode(display=False) as decoding:
        decoder.vae.decode(latents)
    done = 2 * steps * step.get_total_flops() + decoding.get_total_flops()
    assert 0.5 < needs_of(config, shapes).picture_flops / done < 2


@torch.no_grad()
@pytest.mark.parametrize("keep", ["values", "features"])
@pytest.mark.parametrize("rule", ["all", "previous"])
def test_what_is_remembered_is_counted(model, config, shapes, keep, rule):
    changed = copy.deepcopy(model.config)
    changed.context_images = rule
    for side in ("text_synchronizer", "image_synchronizer"):
        setattr(changed, side, {**getattr(changed, side), "keep": keep})
    session = InterleavedSession(type(model)(changed).eval())
    session.append_text([1])
    needs = needs_of(json.loads(changed.to_json_string(use_diff=False)), shapes)
    for _ in range(needs.images):
        session.append_image(torch.rand(1, 3, 32, 32))
    session.start_image()
    session.read()
    # 1. Everything that is kept for images, tensors that are shared once.
    pyramids = [level for image in session.images for level in image.features.pyramid]
    values = [v.value[: session.cache.num_images] for v in session.cache.image_values.values()]
    painter = [v.value for v in session.earlier_images(rule).values]
    once = {tensor.data_ptr(): tensor.numel() for tensor in [*pyramids, *values, *painter]}
    # 2. Keys, values and hidden states of each token.
    text = config["text_config"]
    per_token = text["hidden_size"] + 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * (
        text["hidden_size"] // text["num_attention_heads"]
    )
    assert needs.cached_values == sum(once.values()) + needs.tokens * per_token
    assert needs.parameters == sum(map(math.prod, shapes.values()))


def test_a_full_context_takes_memory_and_a_faster_device_less_time(config, shapes):
    needs = needs_of(config, shapes)
    assert needs.memory("float32") > 4 * needs.parameters
    assert needs.memory("bfloat16") * 2 == needs.memory("float32")
    times = [needs.seconds_a_picture(device, "float32") for device in DEVICES]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    longer = {**config, "text_config": {**config["text_config"], "max_position_embeddings": 10**6}}
    assert needs_of(longer, shapes).memory("float32") > needs.memory("float32")


def test_a_model_that_only_writes_takes_no_time_to_paint(config, shapes):
    only_text = {**config, "unet_config": None, "vae_config": None, "text_synchronizer": None}
    needs = needs_of(only_text, shapes)
    assert needs.seconds_a_picture(DEVICES[0], "float32") is None
    assert needs.words_a_second(DEVICES[0], "float32") > 0
