"""Attention maps show where the synchronizers sample, and all of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.errors import UsageError
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.models.attention_maps import (
    Samples,
    by_head,
    cells_in,
    heat_map,
    record_calls,
    samples_of_place,
    samples_of_token,
    weight_in,
)
from mm_interleaved.ops.reference import sample_reference
from mm_interleaved.storyworld.renderer import badge_box, render_scene, scene_at
from studies.attention_pages import AttendedImage, numbers_of, shares_of, sheet, write_attention_maps
from tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def model():
    """With points and weights that depend on the query, as after training."""
    torch.manual_seed(0)
    model = tiny_model().double().eval()
    for index in model.language_model.synchronized_layers:
        # Closed gates would let any place pass for the right one.
        torch.nn.init.constant_(model.language_model.layers[index].synchronizer.gate, 0.8)
    for module in model.modules():
        for name in ("sampling_offsets", "attention_logits"):
            if hasattr(module, name):
                torch.nn.init.normal_(getattr(module, name).weight, std=0.3)
    return model


@torch.no_grad()
def read(model, num_images=2):
    """A row of two words, images, two words: (hidden states, calls)."""
    config = model.config
    ids, starts = [5, 6], []
    for _ in range(num_images):
        starts.append(len(ids))
        ids += [config.image_start_token_id] + [config.image_token_id] * config.num_slots
    ids += [7, 8]
    pixels = torch.rand(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with record_calls(model) as calls:
        output = model(input_ids=torch.tensor([ids]), pixel_values=pixels, image_start=torch.tensor([starts]))
    return output, calls


def test_each_synchronized_layer_is_recorded_once_and_changes_nothing(model):
    output, calls = read(model)
    assert [call.place for call in calls] == [
        f"layer {index}" for index in model.language_model.synchronized_layers
    ]
    again, later = read(model)
    assert torch.equal(output.hidden, again.hidden)
    for index in model.language_model.synchronized_layers:
        assert not model.language_model.layers[index].synchronizer._forward_pre_hooks
    assert len(later) == len(calls)


def test_weights_sum_to_one_with_attention_to_nothing(model):
    _, calls = read(model)
    for call in calls:
        total = call.plan.weight.sum((-2, -1)) + call.plan.ignore
        assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
    last = len(calls[0].plan.ignore[0]) - 1
    shares = [float(samples.weight.sum()) for samples in samples_of_token(calls, last)]
    nowhere = sum(float(call.plan.ignore[0, last].mean()) for call in calls) / len(calls)
    assert sum(shares) + nowhere == pytest.approx(1, abs=1e-6)
    assert min(shares) > 0


def test_points_lie_where_the_op_samples(model):
    """The recorded places and weights give, by plain bilinear sampling, what the synchronizer put out."""
    index = model.language_model.synchronized_layers[0]
    block, called = model.language_model.layers[index].synchronizer, []
    handle = block.register_forward_hook(lambda module, given, out: called.append((given, out)))
    _, calls = read(model)
    handle.remove()
    (_, values, _), expected = called[0]
    core, plan = block.synchronizer, calls[0].plan
    value_BSHD = values.value[values.image_BN].flatten(1, 2)
    sizes = values.level_sizes * values.image_BN.shape[1]
    seen = sample_reference(value_BSHD, sizes, plan.location, plan.weight)
    with torch.no_grad():
        output = block.gate.tanh() * core.output_projection(seen.flatten(2))
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


def test_heads_apart_give_what_they_give_together(model):
    _, calls = read(model)
    last = len(calls[0].plan.ignore[0]) - 1
    heads = [head for call in calls for head in by_head(call)]
    assert heads[1].place == f"{calls[0].place}, head 1"
    together = samples_of_token(calls, last)[0].weight.sum()
    apart = [samples_of_token([head], last)[0].weight.sum() for head in heads]
    assert float(together) == pytest.approx(float(sum(apart)) / len(apart), rel=1e-5)


def test_no_token_sees_an_image_that_is_still_to_come(model):
    _, calls = read(model)
    first, second = samples_of_token(calls, 2 + 1 + model.config.num_slots)
    assert first.weight.sum() > 0 and second.weight.sum() == 0


@torch.no_grad()
def test_a_place_of_a_new_image_is_recorded_in_all_its_steps(model):
    decoder = model.image_decoder
    pyramid = model.encode_images(torch.rand(2, 3, 32, 32).double()).pyramid
    earlier = model.project_earlier_images(pyramid, torch.tensor([[0, 1]]))
    with record_calls(model) as calls:
        for timestep in (900, 100):
            noise = torch.randn(1, 4, 8, 8).double()
            decoder.predict(noise, torch.tensor(timestep), decoder.negative_conditioning, earlier)
    assert [call.place for call in calls[-2:]] == [f"skip {len(decoder.synchronizers.skips) - 1}", "middle"]
    box = (0.25, 0.25, 0.5, 0.5)
    samples = samples_of_place(calls, box, min_size=8)
    wide = [call for call in calls if min(call.map_size) >= 8]
    chosen = cells_in(box, (8, 8))
    assert chosen == [2 * 8 + 2, 2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3]
    nowhere = sum(float(call.plan.ignore[0, chosen].mean()) for call in wide) / len(wide)
    assert sum(float(one.weight.sum()) for one in samples) + nowhere == pytest.approx(1, abs=1e-6)


def test_heat_falls_where_samples_are():
    _, calls = read(tiny_model().eval().double())
    samples = samples_of_token(calls, len(calls[0].plan.ignore[0]) - 1)[0]
    inside = (
        (samples.location > samples.cell[:, None]) & (samples.location < 1 - samples.cell[:, None])
    ).all(1)
    kept = samples._replace(
        location=samples.location[inside], weight=samples.weight[inside], cell=samples.cell[inside]
    )
    heat = heat_map(kept, 64)
    assert float(heat.sum()) == pytest.approx(float(kept.weight.sum()), rel=0.02)
    assert weight_in(kept, (0, 0, 1, 1), 64) == pytest.approx(float(heat.sum()), rel=1e-6)
    one = kept._replace(location=kept.location[:1], weight=kept.weight[:1], cell=kept.cell[:1])
    y, x = divmod(int(heat_map(one, 64).argmax()), 64)
    assert abs((x + 0.5) / 64 - float(one.location[0, 0])) < 1 / 64
    assert abs((y + 0.5) / 64 - float(one.location[0, 1])) < 1 / 64


def test_a_place_smaller_than_a_cell_is_the_cell_at_its_centre():
    assert cells_in((0.30, 0.80, 0.32, 0.82), (4, 4)) == [3 * 4 + 1]


def test_the_frame_lies_on_the_badge_and_heat_where_it_was_sampled():
    scene = scene_at("test", 3, 0)
    figure, image = scene.figures[0], PILImage.fromarray(render_scene(scene))
    left, top, right, bottom = shares_of(badge_box(figure))
    centre = torch.tensor([[(left + right) / 2, (top + bottom) / 2]])
    seen = AttendedImage(
        image, "image 1", Samples(centre, torch.tensor([0.5]), torch.tensor([1 / 32])), figure
    )
    numbers = numbers_of(seen)
    assert numbers["on_image"] == 0.5
    assert numbers["on_badge"] == pytest.approx(0.5, abs=0.05)
    assert numbers["area_of_badge"] < 0.01
    # What the frame holds is what differs between two badges.
    badge = "A" if figure.character.badge != "A" else "H"
    other = replace(figure, character=replace(figure.character, badge=badge))
    changed = replace(scene, figures=(other, *scene.figures[1:]))
    rows, columns = np.nonzero((render_scene(scene) != render_scene(changed)).any(-1))
    assert left * 64 <= columns.min() and columns.max() < right * 64
    assert top * 64 <= rows.min() and rows.max() < bottom * 64
    # The heat is red there, and nowhere else.
    plain, heated = (np.asarray(sheet([one], "")).astype(int) for one in (
        replace(seen, samples=seen.samples._replace(weight=torch.tensor([0.0]))), seen,
    ))  # fmt: skip
    y, x = np.nonzero((plain != heated).any(-1))
    # The caption under the image tells another share, so it differs too.
    in_image = y < plain.shape[0] - 34
    assert abs(x[in_image].mean() - 8 - float(centre[0, 0]) * 320) < 8


def storyteller(**changes):
    """A generator for whole stories, which are long in bytes; two denoising steps, a few words."""
    text_config = tiny_config().text_config.to_dict() | {"max_position_embeddings": 2048}
    model = tiny_model(text_config=text_config, **changes)
    model.config.generation_settings = {"num_inference_steps": 2, "max_new_tokens": 4}
    return InterleavedGenerator(model, tiny_processor(model.config))


def test_attention_maps_of_a_story_are_images_and_their_numbers(tmp_path):
    numbers = write_attention_maps(storyteller(), 0, 0, tmp_path / "maps")
    assert numbers == json.loads((tmp_path / "maps" / "attention.json").read_text())
    word, badge = numbers["word"], numbers["badge"]
    assert word["question"] == f"What is on the badge of the {numbers['hero']}?"
    assert word["truth"] == badge["truth"]
    [shares] = word["images"]
    assert 0 < shares["on_badge"] < shares["on_hero"] < shares["on_image"] <= 1
    # Two layers of two heads each sampled.
    assert sorted(word["heads"]) == [f"layer {index}, head {head}" for index in (0, 2) for head in (0, 1)]
    mean = sum(head["on_image"] for head in word["heads"].values()) / len(word["heads"])
    assert shares["on_image"] == pytest.approx(mean, abs=1e-3)
    # The U-Net attends to one earlier image, or all of them: the hero stood in at least one.
    assert any("on_badge" in shares for shares in badge["images"])
    assert sum(shares["on_image"] for shares in badge["images"]) <= 1.001
    for name, height in (("word.png", 5 * 64 + 2 * 34), ("badge.png", 5 * 64 + 2 * 34)):
        image = PILImage.open(tmp_path / "maps" / name)
        assert image.height == height and len(image.getcolors(1 << 20)) > 50
    assert PILImage.open(tmp_path / "maps" / "word.png").width == 3 * (320 + 8) + 8


def test_attention_maps_need_a_model_with_synchronizers(tmp_path):
    with pytest.raises(UsageError, match="need a model with synchronizers"):
        write_attention_maps(storyteller(text_synchronizer=None), 0, 0, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attention_maps_of_a_model_on_a_gpu_is_the_same(tmp_path):
    generator = storyteller()
    expected = write_attention_maps(generator, 0, 0, tmp_path / "cpu")["word"]["images"]
    generator.model.cuda()
    assert write_attention_maps(generator, 0, 0, tmp_path / "gpu")["word"]["images"][0] == pytest.approx(
        expected[0], abs=1e-3
    )
