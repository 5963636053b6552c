"""What `plan` tells agrees with what a model does when it runs."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.cost import DEVICES, needs_of
from mm_interleaved.models.operations import (
    count_operations,
    decoding_operations,
    image_operations,
    meta_model,
    step_operations,
    token_operations,
)
from mm_interleaved.models.vision import select_levels
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


def done(work):
    """Operations of a call with numbers, as PyTorch counts them; it counts fused attention on GPUs alone."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@torch.no_grad()
def test_counted_operations_of_an_image_are_those_that_are_done(model, config, shapes):
    decoder = model.image_decoder
    steps, side = 4, config["unet_config"]["sample_size"]
    session = InterleavedSession(model)
    session.append_text([1])
    session.append_image(torch.rand(1, 3, 32, 32))
    session.start_image()
    earlier = session.earlier_images("all").repeat(2)
    latents = torch.randn(2, config["unet_config"]["in_channels"], side, side)
    conditioning = torch.randn(2, 4, config["unet_config"]["cross_attention_dim"])
    timestep = torch.tensor([3, 3])
    # The first step folds weights.
    decoder.predict(latents, timestep, conditioning, earlier)
    whole = meta_model(config)
    conditioned = decoder.negative_conditioning.detach().expand(2, -1, -1)
    step = done(lambda: decoder.predict(latents, timestep, conditioned, earlier))
    assert step_operations(whole, 1).products == step
    decoding = done(lambda: decoder.vae.decode(latents[:1]))
    assert decoding_operations(whole).products == decoding
    encoding = done(
        lambda: decoder.project_earlier_images(
            select_levels(read_images(model), config["image_synchronizer"]["levels"]), torch.tensor([[0]])
        )
    )
    assert image_operations(whole).products == encoding
    config = {**config, "generation_settings": {"num_inference_steps": steps}}
    counted = step_operations(
        whole, min(needs_of(config, shapes).images, config["image_synchronizer"]["max_images"] - 1)
    ).total
    assert needs_of(config, shapes).generation_flops == steps * counted + decoding


def read_images(model):
    """The pyramid of an image, which every language layer has projected."""
    pyramid = model.encode_images(torch.rand(1, 3, 32, 32)).pyramid
    model.project_images(pyramid)
    return pyramid


@torch.no_grad()
@pytest.mark.parametrize("num_images", [0, 2])
def test_counted_operations_of_a_token_are_those_that_are_done(model, config, num_images):
    session = InterleavedSession(model)
    session.append_text([1, 5])
    for _ in range(num_images):
        session.append_image(torch.rand(1, 3, 32, 32))
    session.append_text([6])
    session.read()
    # The first word after new images folds weights.
    session.append_text([7])
    session.read()
    length = session.cache.num_tokens
    session.append_text([8])
    read = done(session.read)
    assert token_operations(meta_model(config), length, num_images).products == read


def test_sampling_is_counted_by_its_formula():
    value, grid = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 6, 2)
    counted = count_operations(lambda: torch.nn.functional.grid_sample(value, grid, align_corners=False))
    # Four cells for each of 5 x 6 samples of 3 channels, multiplied and added.
    assert counted.products == 0 and counted.sampling == 2 * 3 * 5 * 6 * 8


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
    times = [needs.seconds_an_image(device, "float32") for device in DEVICES]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    longer = {**config, "text_config": {**config["text_config"], "max_position_embeddings": 10**6}}
    assert needs_of(longer, shapes).memory("float32") > needs.memory("float32")


def test_a_model_that_generates_text_only_takes_no_time_for_images(config, shapes):
    only_text = {**config, "unet_config": None, "vae_config": None, "text_synchronizer": None}
    needs = needs_of(only_text, shapes)
    assert needs.seconds_an_image(DEVICES[0], "float32") is None
    assert needs.tokens_a_second(DEVICES[0], "float32") > 0
