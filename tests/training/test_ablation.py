"""Variants differ in what they are meant to differ in, and their cost is counted."""

import json
import re

import pytest
import torch

from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.storyworld.attribute_supervision import NUM_VALUES, NUM_VALUES_AT_POSITION
from mm_interleaved.recipes.storyworld.vision_stage import SlotProbe
from mm_interleaved.training.settings import StageConfig
from studies import cost as ablation_cost
from studies.ablation.build import build_variant
from studies.ablation.settings import VariantSizes
from studies.ablation.slot_stage import SlotStage
from studies.ablation.variants import (
    ALL_LEVELS,
    NO_LEVELS,
    SLOT_COUNTS,
    WITH,
    WITHOUT,
    ImageDecoderVariant,
    LanguageVariant,
    all_variants,
    chosen_variants,
    kind_with,
)
from studies.cost import made_by, weights_name, with_cost

SMALL = VariantSizes(text_dim=32, text_layers=2, text_heads=2)


def test_sixteen_variants_share_thirteen_language_models_and_four_image_decoders():
    variants = all_variants()
    assert len({variant.name for variant in variants}) == len(variants) == 16
    assert (
        len({variant.language.name for variant in variants})
        == len({variant.language for variant in variants})
        == 13
    )
    assert (
        len({variant.image_decoder.name for variant in variants})
        == len({variant.image_decoder for variant in variants})
        == 4
    )
    for kind in (WITH, WITHOUT):
        assert sorted(variant.language.seed for variant in variants if variant.kind == kind) == [1, 2, 3]
    kinds = {kind_with(count, has_synchronizers=has) for count in SLOT_COUNTS for has in (True, False)}
    assert kinds <= {variant.kind for variant in variants}


def test_unknown_variants_are_refused_by_name():
    assert [variant.name for variant in chosen_variants(("neither-2",))] == ["neither-2"]
    with pytest.raises(UsageError, match=r"variants: found 'both', expected some of both-1"):
        chosen_variants(("both",))


@pytest.mark.parametrize("num_slots", SLOT_COUNTS)
def test_variants_share_vision_and_unet_and_differ_in_synchronizers(model, num_slots):
    full = build_variant(model, SMALL, LanguageVariant(num_slots=num_slots), ImageDecoderVariant())
    without = build_variant(
        model,
        SMALL,
        LanguageVariant(num_slots=num_slots, levels=NO_LEVELS),
        ImageDecoderVariant(levels=NO_LEVELS),
    )
    assert full.language_model.synchronized_layers == (0,)
    assert without.language_model.synchronized_layers == () and without.image_decoder.synchronizers is None
    assert full.config.num_slots == without.config.num_slots == num_slots
    assert full.config.part("image_synchronizer").levels == ALL_LEVELS
    mine = model.state_dict()
    for variant in (full, without):
        theirs = variant.state_dict()
        for name in ("vision.clip.pre_norm.weight", "image_decoder.unet.conv_in.weight"):
            assert torch.equal(theirs[name], mine[name]), name
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for level, expected in zip(
            full.eval().encode_images(pixels).pyramid,
            model.eval().encode_images(pixels).pyramid,
            strict=True,
        ):
            assert torch.equal(level, expected)


@pytest.mark.parametrize("num_slots", SLOT_COUNTS)
def test_any_number_of_slots_may_hold_everything(num_slots):
    probe = SlotProbe(num_slots, slot_dim=6)
    slots = torch.randn(2, num_slots, 6, requires_grad=True)
    logits = probe(slots)
    assert logits.shape == (2, sum(NUM_VALUES))
    logits.square().sum().backward()
    assert bool((slots.grad.abs().sum((0, 2)) > 0).all()), "every slot counts"


def test_positions_are_probed_by_the_same_weights():
    probe, slots = SlotProbe(7, slot_dim=4), torch.randn(1, 7, 4)
    width = sum(NUM_VALUES_AT_POSITION)
    left = probe(slots)[:, :width]
    exchanged = slots[:, [2, 3, 0, 1, 4, 5, 6]]
    assert torch.equal(probe(exchanged)[:, width : 2 * width], left)


def test_slots_are_asked_for_badges_and_the_pyramid_stays(model):
    stage = SlotStage(model.vision, seed=0, batch_size=2)
    losses = stage.compute_losses(stage.make_batch(0))
    assert losses.named["badge"] > 0 and losses.named["pattern"] > 0
    losses.total.backward()
    coarse = SlotStage(model.vision, seed=0, batch_size=2, are_coarse=True)
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
    assert made["commit"] == "unknown" or re.fullmatch(r"[0-9a-f]{12}\+?", made["commit"])


def test_two_starts_are_distinguished_by_their_weights(tmp_path):
    names = []
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        names.append(weights_name(tmp_path / folder))
    assert names[0] == names[1] != names[2] and len(names[0]) == 12
