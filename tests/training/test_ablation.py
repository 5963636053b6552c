"""Twins differ in what they are meant to differ in, and their cost is counted."""

import json
import re

import pytest
import torch

from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.storyworld.attribute_supervision import SIZES, SIZES_AT_POSITION
from mm_interleaved.recipes.storyworld.vision_stage import SlotReader
from mm_interleaved.training.settings import StageConfig
from studies import provenance as ablation_cost
from studies.ablation.build import build_twin
from studies.ablation.settings import TwinSizes
from studies.ablation.slot_stage import SlotSideStage
from studies.ablation.variants import (
    ALL_LEVELS,
    NO_LEVELS,
    SLOT_COUNTS,
    WITH,
    WITHOUT,
    Painter,
    Reader,
    all_twins,
    arm_with,
    chosen_twins,
)
from studies.provenance import commit, made_by, weights_name, with_cost

SMALL = TwinSizes(text_dim=32, text_layers=2, text_heads=2)


def test_sixteen_twins_share_thirteen_readers_and_four_painters():
    twins = all_twins()
    assert len({twin.name for twin in twins}) == len(twins) == 16
    assert len({twin.reader.name for twin in twins}) == len({twin.reader for twin in twins}) == 13
    assert len({twin.painter.name for twin in twins}) == len({twin.painter for twin in twins}) == 4
    for arm in (WITH, WITHOUT):
        assert sorted(twin.reader.seed for twin in twins if twin.arm == arm) == [1, 2, 3]
    arms = {arm_with(count, is_looking=looking) for count in SLOT_COUNTS for looking in (True, False)}
    assert arms <= {twin.arm for twin in twins}


def test_unknown_twins_are_refused_by_name():
    assert [twin.name for twin in chosen_twins(("neither-2",))] == ["neither-2"]
    with pytest.raises(UsageError, match=r"twins: found 'both', expected some of both-1"):
        chosen_twins(("both",))


@pytest.mark.parametrize("num_slots", SLOT_COUNTS)
def test_twins_share_eyes_and_painter_and_differ_in_who_looks(model, num_slots):
    looking = build_twin(model, SMALL, Reader(num_slots=num_slots), Painter())
    blind = build_twin(model, SMALL, Reader(num_slots=num_slots, levels=NO_LEVELS), Painter(levels=NO_LEVELS))
    assert looking.language_model.synchronized_layers == (0,)
    assert blind.language_model.synchronized_layers == () and blind.image_decoder.synchronizers is None
    assert looking.config.num_slots == blind.config.num_slots == num_slots
    assert looking.config.part("image_synchronizer").levels == ALL_LEVELS
    mine = model.state_dict()
    for twin in (looking, blind):
        theirs = twin.state_dict()
        for name in ("vision.clip.pre_norm.weight", "image_decoder.unet.conv_in.weight"):
            assert torch.equal(theirs[name], mine[name]), name
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for level, expected in zip(
            looking.eval().encode_images(pixels).pyramid,
            model.eval().encode_images(pixels).pyramid,
            strict=True,
        ):
            assert torch.equal(level, expected)


@pytest.mark.parametrize("num_slots", SLOT_COUNTS)
def test_any_number_of_slots_may_tell_everything(num_slots):
    reader = SlotReader(num_slots, slot_dim=6)
    slots = torch.randn(2, num_slots, 6, requires_grad=True)
    answers = reader(slots)
    assert answers.shape == (2, sum(SIZES))
    answers.square().sum().backward()
    assert bool((slots.grad.abs().sum((0, 2)) > 0).all()), "every slot counts"


def test_positions_are_told_in_one_code():
    reader, slots = SlotReader(7, slot_dim=4), torch.randn(1, 7, 4)
    width = sum(SIZES_AT_POSITION)
    left = reader(slots)[:, :width]
    exchanged = slots[:, [2, 3, 0, 1, 4, 5, 6]]
    assert torch.equal(reader(exchanged)[:, width : 2 * width], left)


def test_slots_are_asked_for_badges_and_the_pyramid_stays(model):
    stage = SlotSideStage(model.vision, seed=0, batch_size=2)
    losses = stage.compute_losses(stage.make_batch(0))
    assert losses.named["badge"] > 0 and losses.named["pattern"] > 0
    losses.total.backward()
    coarse = SlotSideStage(model.vision, seed=0, batch_size=2, are_coarse=True)
    with torch.no_grad():
        assert coarse.compute_losses(coarse.make_batch(0)).named["badge"] == 0
    learned = {name.split(".")[0] for name, p in model.vision.named_parameters() if p.grad is not None}
    assert learned == {"token_projection", "token_norm", "position_norm", "resampler", "slot_projection"}


def test_cost_adds_up_over_interruptions(tmp_path):
    config = StageConfig(steps=4, learning_rate=1e-3)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_cost(tmp_path, config, flops_a_step=lambda: 5.0, work=interrupted)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert not cost["is_finished"] and cost["flops"] == 20.0
    with_cost(tmp_path, config, flops_a_step=lambda: 1 / 0, work=lambda: None)
    again = json.loads((tmp_path / "cost.json").read_text())
    assert again["is_finished"] and again["wall_hours"] >= cost["wall_hours"]


def test_cost_names_each_machine_and_commit_that_made_it(tmp_path, monkeypatch):
    config = StageConfig(steps=4, learning_rate=1e-3)

    def interrupted():
        raise KeyboardInterrupt

    def go(commit, work):
        made = {"commit": commit, "machine": "A chip", "date": "2026-11-23"}
        monkeypatch.setattr(ablation_cost, "made_by", lambda: made)
        with_cost(tmp_path, config, flops_a_step=lambda: 5.0, work=work, start="w1")

    for commit_name in ("c1", "c1", "c2"):
        with pytest.raises(KeyboardInterrupt):
            go(commit_name, interrupted)
    go("c2", lambda: None)
    go("c3", lambda: None)
    goes = json.loads((tmp_path / "cost.json").read_text())["made_by"]
    assert [one["commit"] for one in goes] == ["c1", "c2"], "what was finished, c3 has not made"
    assert {one["start"] for one in goes} == {"w1"}


def test_what_is_made_now_has_a_commit_a_machine_and_a_day():
    made = made_by()
    assert set(made) == {"commit", "machine", "date"} and "cores" in made["machine"]
    assert commit() == "unknown" or re.fullmatch(r"[0-9a-f]{12}\+?", commit())


def test_two_starts_are_told_apart_by_their_weights(tmp_path):
    names = []
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        names.append(weights_name(tmp_path / folder))
    assert names[0] == names[1] != names[2] and len(names[0]) == 12
