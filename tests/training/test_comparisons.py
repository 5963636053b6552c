"""Runs that compare: variants and sizes are trained, stopped, gone on with, and refused where they would not
compare.
"""

import json
from functools import partial

import pytest
import torch

from mm_interleaved.errors import UsageError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.registry import RECIPES
from mm_interleaved.recipes.run import run_recipe
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches
from mm_interleaved.recipes.storyworld.stage_cost import average_flops
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.training.loop import StoppedBySignal
from mm_interleaved.training.parameter_groups import synchronizer_rules
from mm_interleaved.training.stage import trained_parameters
from mm_interleaved.typed_settings import flat_record
from studies.ablation import recipe as ablation
from studies.ablation.build import VariantSizes
from studies.recipes import STUDY_RECIPES
from studies.scaling.recipe import ScalingConfig, size_folder

TINY_STAGE = ("steps=1", "warmup_steps=1", "log_every=1", "use_bfloat16=false", "ema_decay=0.0")
READS = BatchKind(share=1, batch_size=1, tasks={"edit": 1})


def stage_settings(*stages):
    return [f"{stage}.{setting}" for stage in stages for setting in TINY_STAGE]


@pytest.fixture(scope="module")
def folder(make_model, processor, tmp_path_factory):
    """A tiny model as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_batches(monkeypatch):
    monkeypatch.setattr(ablation, "average_flops", partial(average_flops, num_examples=1))
    monkeypatch.setattr(ablation, "LANGUAGE_BATCHES", (READS,))
    monkeypatch.setattr(ablation, "DENOISING_BATCHES", (READS,))


def settings_of(folder):
    return [f"start_from={folder}", "num_threads=1", "slot_batch_size=1", *stage_settings("slots", "text")]


def test_two_variants_are_trained_stopped_gone_on_with_and_share_their_slots(
    folder, tiny_batches, tmp_path, monkeypatch
):
    run, sizes = tmp_path / "run", ("sizes.text_dim=16", "sizes.text_layers=2", "sizes.text_heads=2")
    settings = [
        *settings_of(folder), *stage_settings("unet"), *sizes, "image_batch_size=1", "pool_batches=1",
        "variants=both-1,neither-1",
    ]  # fmt: skip
    train_stage, trained = ablation.train_stage, []

    def stops_at_the_unet(stage, *args, **more):
        trained.append(stage.name)
        if stage.name == "unet" and trained.count("unet") == 1:
            raise StoppedBySignal("stopped by SIGTERM")
        train_stage(stage, *args, **more)

    monkeypatch.setattr(ablation, "train_stage", stops_at_the_unet)
    with pytest.raises(StoppedBySignal):
        run_recipe("ablation", settings, out=run, recipes=STUDY_RECIPES)
    assert not (run / "twins").exists() and (run / "reader-4-looking-1" / "cost.json").exists()
    first = json.loads((run / "reader-4-looking-1" / "cost.json").read_text())

    with pytest.raises(UsageError, match=r"with text\.steps=1, found 2.*only device, num_threads, variants"):
        run_recipe("ablation", ["text.steps=2"], resume=True, out=run, recipes=STUDY_RECIPES)
    out = run_recipe("ablation", ["variants=neither-1,both-1"], resume=True, out=run, recipes=STUDY_RECIPES)
    assert sorted(path.name for path in out.iterdir()) == ["both-1", "neither-1"]
    assert json.loads((run / "reader-4-looking-1" / "cost.json").read_text()) == first
    costs = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/cost.json")}
    assert sorted(costs) == [
        "painter-blind-1", "painter-looking-1", "reader-4-blind-1", "reader-4-looking-1", "slots-4",
    ]  # fmt: skip
    assert all(cost["is_finished"] and cost["flops"] > 0 for cost in costs.values())
    both, neither = (
        MMInterleavedForConditionalGeneration.from_pretrained(out / name).state_dict()
        for name in ("both-1", "neither-1")
    )
    assert all(torch.equal(both[name], neither[name]) for name in both if name.startswith("vision."))
    assert any(".synchronizer." in name for name in both) and not any("synchroni" in name for name in neither)


def test_each_size_is_trained_and_a_run_is_not_begun_twice(folder, tiny_batches, tmp_path):
    run = tmp_path / "run"
    settings = [*settings_of(folder), "widths=8,16", "layers=1,2"]
    run_recipe("scaling", settings, out=run, recipes=STUDY_RECIPES)
    costs = [
        json.loads((size_folder(run, width) / "reader-4-looking-1" / "cost.json").read_text())
        for width in (8, 16)
    ]
    assert costs[0]["flops_a_step"] < costs[1]["flops_a_step"]
    with pytest.raises(UsageError, match="holds a run already; give --resume"):
        run_recipe("scaling", settings, out=run, recipes=STUDY_RECIPES)
    with pytest.raises(UsageError, match="began with seed=1, found 2"):
        run_recipe("scaling", ["seed=2"], resume=True, out=run, recipes=STUDY_RECIPES)
    run_recipe("scaling", resume=True, out=run, recipes=STUDY_RECIPES)


def test_sizes_that_cannot_be_are_refused_before_anything_is_trained():
    for settings, message in (
        ({"widths": (64, 128), "layers": (2,)}, "widths and layers must be as many numbers.*2 and 1"),
        ({"widths": (), "layers": ()}, "at least one"),
        ({"widths": (64, 70), "layers": (2, 2)}, "widths must be multiples.*found 70"),
        ({"widths": (64, 64), "layers": (2, 2)}, "widths must differ from each other, found 64, 64"),
        ({"widths": (64,), "layers": (0,)}, "layers must be 1 or more"),
        ({"slot_batch_size": 0}, "slot_batch_size must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            ScalingConfig(**settings)
    with pytest.raises(UsageError, match=r"text_dim must be a multiple of twice text_heads \(8\), found 20"):
        VariantSizes(text_dim=20, text_heads=4)


def test_what_may_change_is_a_setting():
    for recipe in RECIPES.values():
        assert (recipe.may_change or frozenset()) <= flat_record(recipe.settings()).keys()


def test_rules_of_synchronizers_are_theirs_alone(model, processor):
    stage = TextStage(model, DocumentBatches(processor, (READS,), seed=0))
    rules = synchronizer_rules(stage.trained_parts(), 1e-3)
    assert rules.keys() == {name for name in trained_parameters(stage) if ".synchronizer." in name}
    assert rules and {rule.learning_rate for rule in rules.values()} == {1e-3}
