"""Training: it learns, it resumes to the bit, it stops where it must."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mm_interleaved.documents.document import Text
from mm_interleaved.errors import ModelFileError, NumericalError
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    ATTRIBUTES,
    ATTRIBUTES_AT_POSITION,
    NO_LABEL,
    NUM_VALUES,
    NUM_VALUES_AT_POSITION,
    badge_cells,
    cell_labels,
)
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatch, DocumentBatches
from mm_interleaved.recipes.storyworld.coreference_supervision import (
    ATTRIBUTES_OF_MENTION,
    VALUES_OF_MENTION,
    introduction_labels,
    mention_labels,
)
from mm_interleaved.recipes.storyworld.image_stage import ImageStage
from mm_interleaved.recipes.storyworld.initialisation import open_to_images, open_to_learning
from mm_interleaved.recipes.storyworld.text_stage import TextStage, read_batch
from mm_interleaved.recipes.storyworld.unet_stage import UNetStage
from mm_interleaved.recipes.storyworld.vae_stage import VAEStage, normalise_latents
from mm_interleaved.recipes.storyworld.vision_stage import SlotProbe, VisionStage
from mm_interleaved.storyworld.renderer import figure_box, scene_at
from mm_interleaved.storyworld.tasks import document
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.storyworld.world import BADGES, POSITIONS, SPECIES, scene_from_record
from mm_interleaved.storyworld.world import NAMES as WHO
from mm_interleaved.training.loop import StoppedBySignal, train_stage
from mm_interleaved.training.optimizer import MuonWithAdamW, learning_rate
from mm_interleaved.training.parameter_groups import LinearProbe, inner_matrices
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Losses
from saved_checkpoints import load_newest_checkpoint

ONE_DRAWING = BatchKind(share=1, batch_size=1, tasks={"draw": 1})
QUICK = StageConfig(steps=6, learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, save_every=3, log_every=2)


def losses_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def final_tensors(folder):
    return {path.name: load_file(path) for path in sorted((folder / "step-00000006").glob("*.safetensors"))}


def test_one_document_is_learned_by_heart(model, processor, tmp_path):
    open_to_images(model)
    batch = DocumentBatches(processor, (ONE_DRAWING,), seed=0, target_pixels=True)(0)
    config = StageConfig(steps=40, learning_rate=1e-2, warmup_steps=5, log_every=10)
    train_stage(TextStage(model, lambda step: batch), config, tmp_path, seed=0)
    lines = losses_of(tmp_path)
    assert lines[-1]["text"] < 0.2 * lines[0]["text"], lines


def test_the_denoising_loss_of_one_document_falls(model, processor, tmp_path):
    batch = DocumentBatches(processor, (ONE_DRAWING,), seed=0, target_pixels=True)(0)
    config = StageConfig(steps=60, learning_rate=1e-2, warmup_steps=5, log_every=20)
    stage = ImageStage(model, lambda step: batch, batch_size=4, pool_batches=1, repeats=60)
    train_stage(stage, config, tmp_path, seed=0)
    lines = losses_of(tmp_path)
    assert lines[-1]["image"] < 0.9 * lines[0]["image"], lines


def test_the_image_stage_changes_nothing_that_reads(model, processor, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stories = BatchKind(share=1, batch_size=1, tasks={"story": 1})
    batches = DocumentBatches(processor, (stories,), seed=0, target_pixels=True)
    stage = ImageStage(model, batches, batch_size=2, pool_batches=1, repeats=3)
    train_stage(stage, QUICK, tmp_path, seed=0)
    changed = {
        name.split(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"image_decoder", "context_projection"}
    for name, tensor in model.image_decoder.vae.state_dict().items():
        assert torch.equal(tensor, before[f"image_decoder.vae.{name}"])


def test_text_only_batches_teach_words_and_leave_vision_and_synchronizers(model, processor, tmp_path):
    open_to_learning(model)
    batches = DocumentBatches(processor, (replace(ONE_DRAWING, is_text_only=True),), seed=0)
    batch = batches(0)
    assert batch.is_text_only
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = StageConfig(steps=40, learning_rate=1e-2, optimizer="muon", warmup_steps=5, log_every=10)
    train_stage(TextStage(model, lambda step: batch), config, tmp_path, seed=0)
    lines = losses_of(tmp_path)
    assert lines[-1]["text"] < 0.2 * lines[0]["text"], lines
    assert lines[-1]["attributes"] < 0.5 * lines[0]["attributes"], lines
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = ("language_model.", "text_head.", "image_start", "context", "image_decoder.resampler.")
    assert all(name.startswith(parts) and "value_projection" not in name for name in changed), changed


def test_a_text_only_batch_reads_what_the_model_reads_before_images(model, processor):
    """Its own path computes the hidden states of the model's forward up to the first image."""
    batches = DocumentBatches(processor, (replace(ONE_DRAWING, is_text_only=True),), seed=0)
    stage, inputs = TextStage(model.eval(), batches), batches(0).batch
    with torch.no_grad():
        text_only, seeing = stage._read_text_only(inputs), read_batch(model, inputs)
    first = int(inputs.image_start[0, 0]) + 1
    torch.testing.assert_close(text_only[:, :first], seeing[:, :first])
    assert not torch.allclose(text_only[:, first:], seeing[:, first:])


def test_slots_of_positions_share_a_code():
    probe = SlotProbe(num_slots=5, slot_dim=6)
    slots = torch.randn(2, 5, 6)
    left, middle, right, setting = probe(slots).split(
        [sum(NUM_VALUES_AT_POSITION)] * 3 + [sum(NUM_VALUES[-3:])], dim=1
    )
    exchanged = slots[:, [2, 1, 0, 3, 4]]
    again = probe(exchanged).split([sum(NUM_VALUES_AT_POSITION)] * 3 + [sum(NUM_VALUES[-3:])], dim=1)
    for found, expected in zip(again, (right, middle, left, setting), strict=True):
        assert torch.equal(found, expected)
    assert SlotProbe(num_slots=1, slot_dim=6)(slots[:, :1]).shape == (2, sum(NUM_VALUES))


def test_each_cell_of_the_pyramid_is_probed_for_the_figure_on_which_it_lies(model):
    """One probe for all cells and levels; badges and patterns are asked of them, and not of the slots."""
    stage = VisionStage(model.vision, seed=0, batch_size=2)
    batch = stage.make_batch(0)
    named = stage.compute_losses(batch).named
    assert all(named[name] > 0 for name in ("badge", "slots", "cells_32", "cells_16", "cells_8"))
    badges = ATTRIBUTES.index("badge@left"), ATTRIBUTES.index("badge@middle"), ATTRIBUTES.index("badge@right")
    for index in badges:
        batch.labels[:, index] = 0
    assert torch.equal(stage.compute_losses(batch).named["slots"], named["slots"])


def test_labels_of_cells_stand_where_the_renderer_draws():
    scene = scene_at("train", 0, 3)
    labels = cell_labels(scene, 64)
    kinds = dict(zip(ATTRIBUTES_AT_POSITION, labels, strict=True))
    for figure in scene.figures:
        left, top, right, bottom = figure_box(figure)
        inside = kinds["badge"][top : bottom + 1, left : right + 1]
        assert (inside == BADGES.index(figure.character.badge)).all()
    area = sum(
        (right - left + 1) * (bottom - top + 1)
        for left, top, right, bottom in (figure_box(figure) for figure in scene.figures)
    )
    assert (kinds["badge"] != NO_LABEL).sum() == area
    coarse = cell_labels(scene, 8)
    assert torch.equal(coarse[0], labels[0, 4::8, 4::8])


def test_a_name_is_known_from_its_second_mention_and_its_badge_from_its_first_image():
    story = training_document(0, 0, {"story": 1})
    words, starts = [], []
    for part in story.parts:
        if isinstance(part, Text):
            words += [word.strip(",.") for word in part.text.split()]
        else:
            starts.append(len(words))
            words.append("")
    seeing, text_only = (
        mention_labels([story], [words], torch.tensor([starts]), is_text_only=is_text_only)[0]
        for is_text_only in (False, True)
    )
    hero = scene_from_record(story.meta["scenes"][0]).figures[0].character
    mentions = [index for index, word in enumerate(words) if word == hero.name]
    assert len(mentions) > 2 and mentions[1] < starts[0] < mentions[-1]
    species, badge = ATTRIBUTES_OF_MENTION.index("species"), ATTRIBUTES_OF_MENTION.index("badge")
    assert (seeing[mentions[0]] == NO_LABEL).all()
    assert (seeing[mentions[1:], species] == 1 + SPECIES.index(hero.species)).all()
    assert (seeing[mentions[1], badge], seeing[mentions[-1], badge]) == (NO_LABEL, BADGES.index(hero.badge))
    assert (text_only[:, badge] == NO_LABEL).all() and torch.equal(text_only[:, species], seeing[:, species])
    figures = {figure.position: figure for figure in scene_from_record(story.meta["scenes"][-1]).figures}
    places = [index for index in range(starts[-2], starts[-1]) if words[index] in figures]
    assert places
    for index in places:
        expected = 1 + SPECIES.index(figures[words[index]].character.species)
        assert seeing[index, species] in (NO_LABEL, expected)
    assert (seeing[places, species] != NO_LABEL).any()
    nobody = [index for index, word in enumerate(words) if word not in (*WHO, *POSITIONS)]
    assert (seeing[nobody] == NO_LABEL).all()


def _mentions_in(document, words):
    """By word, what is known of the figure that it mentions, in words: the image stands before them all."""
    labels = mention_labels([document], [("image", *words)], torch.tensor([[0]]), is_text_only=False)[0]
    values = list(VALUES_OF_MENTION.items())
    return {
        word: {name: of[i] for (name, of), i in zip(values, row, strict=True) if i != NO_LABEL}
        for word, row in zip(words, labels[1:].tolist(), strict=True)
    }


def test_kinds_and_places_in_a_question_mention_figures():
    made = next(
        made
        for index in range(100)
        if len((made := document("train", 5, index, "caption")).meta["scenes"][0]["figures"]) == 2
    )
    left, right = sorted(
        scene_from_record(made.meta["scenes"][0]).figures, key=lambda figure: POSITIONS.index(figure.position)
    )
    one, other = right.character.species, left.character.species
    asked = _mentions_in(made, ("Is", "the", one, "to", "the", "left", "of", "the", other, "?"))
    assert asked[one]["badge"] == right.character.badge and asked[other]["pattern"] == left.character.pattern
    assert asked[one]["position"] == right.position and "side" not in asked[one]
    assert asked[other]["side"] == "left" and asked["left"] == asked["?"] == {}
    place = _mentions_in(made, ("Which", "animal", "is", "on", "the", left.position, "?"))
    assert place[left.position]["species"] == left.character.species


def test_labels_of_a_story_hold_where_a_hero_stood_last():
    story = training_document(0, 0, {"story": 1})
    scenes = [scene_from_record(record) for record in story.meta["scenes"]]
    hero = scenes[0].figures[0]
    words, starts = [], []
    for number in range(2):
        words += [hero.character.name, "waves", "image"]
        starts.append(3 * number + 2)
    labels = mention_labels([story], [words], torch.tensor([starts]), is_text_only=True)[0]
    known = dict(zip(ATTRIBUTES_OF_MENTION, labels[3].tolist(), strict=True))
    assert POSITIONS[known["was_at"]] == hero.position and known["images_ago"] == 0
    assert known["badge"] == NO_LABEL and labels[0].eq(NO_LABEL).all()


def test_the_words_of_an_introduction_say_whose_it_is():
    words = ["Mia", "is", "a", "cat", ".", "Mia", "waves", ".", "Meet", "Ben", ",", "a", "dog"]
    mia, ben = WHO.index("Mia"), WHO.index("Ben")
    expected = [mia] * 4 + [NO_LABEL] * 5 + [ben] * 4
    assert introduction_labels([words])[0].tolist() == expected


def test_badges_weigh_more_where_scenes_are_known(model, processor):
    batches = DocumentBatches(processor, (ONE_DRAWING,), seed=0, target_pixels=True)
    settings = {"batch_size": 1, "pool_batches": 1, "repeats": 1}
    plain, weighted = (
        UNetStage(model, batches, **settings, badge_weight=weight).read(batches(0))[0].weight[0]
        for weight in (0.0, 9.0)
    )
    (mask,) = badge_cells(batches(0).documents, plain.shape[-1])
    assert mask.any() and not mask.all()
    torch.testing.assert_close(weighted[mask] / weighted[~mask].mean(), torch.full((int(mask.sum()),), 10.0))
    torch.testing.assert_close(plain, torch.ones_like(plain))


def test_the_unet_stage_learns_from_embeddings_and_changes_the_unet_alone(model, processor, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = DocumentBatches(processor, (ONE_DRAWING,), seed=0, target_pixels=True)(0)
    config = StageConfig(steps=60, learning_rate=1e-2, warmup_steps=5, log_every=20)
    stage = UNetStage(model, lambda step: batch, batch_size=4, pool_batches=1, repeats=60)
    train_stage(stage, config, tmp_path, seed=0)
    lines = losses_of(tmp_path)
    assert lines[-1]["image"] < 0.9 * lines[0]["image"], lines
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = ("image_decoder.unet.", "image_decoder.synchronizers.", "image_decoder.negative_conditioning")
    assert changed and all(name.startswith(parts) for name in changed), changed


def test_muon_makes_updates_of_inner_matrices_orthogonal():
    """All singular values of an update are alike, whatever those of the gradient; kernels count as
    matrices.
    """
    torch.manual_seed(0)
    parts = {"inner": nn.Conv2d(8, 6, 3), "probe": LinearProbe(4, 4), "table": nn.Embedding(4, 4)}
    assert inner_matrices(parts) == {"inner.weight"}
    parts = {"network": nn.ModuleDict(parts)}
    assert inner_matrices(parts) == {"network.inner.weight"}
    kernel = parts["network"]["inner"].weight
    parameters = {f"network.{name}": p for name, p in parts["network"].named_parameters()}
    config = StageConfig(steps=1, learning_rate=0.1, optimizer="muon", weight_decay=0.0)
    optimizer = MuonWithAdamW(parameters, inner_matrices(parts), config)
    before = kernel.detach().clone()
    kernel.grad = torch.randn(6, 1, 1, 1) * torch.randn(1, 8, 3, 3) + 0.05 * torch.randn(6, 8, 3, 3)
    values = torch.linalg.svdvals(kernel.grad.flatten(1))
    assert values.max() > 10 * values.min()
    optimizer.step()
    values = torch.linalg.svdvals((kernel.detach() - before).flatten(1))
    assert values.max() < 2.5 * values.min()


def test_inner_matrices_are_inside_the_networks_and_not_where_something_goes_in_or_comes_out(model):
    parts = {"model": model}
    inner = inner_matrices(parts)
    outside = ("conv_in.", "conv_out.", "patch_embedding.", "text_head.", "synchronizer.", "synchronizers.")
    assert not [name for name in inner if any(f".{place}" in name for place in outside)]
    others = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    others = {f"model.{name}.weight" for name in others} - inner
    assert others and all(any(f".{place}" in name for place in outside) for name in others)


class Interrupted(TextStage):
    """Sends the process a SIGTERM while it makes the batch of one step."""

    def make_batch(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().make_batch(step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_to_the_bit(model, processor, tmp_path, optimizer):
    config = replace(QUICK, optimizer=optimizer)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = DocumentBatches(
        processor, (BatchKind(share=1, batch_size=2, tasks={"draw": 1, "story": 1}),), seed=1
    )
    train_stage(TextStage(model, batches), config, tmp_path / "whole", seed=7)
    handed_on = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(start)
    with pytest.raises(StoppedBySignal, match="SIGTERM after step 4") as stopped:
        train_stage(Interrupted(model, batches), config, tmp_path / "halves", seed=7)
    assert stopped.value.exit_code == 75
    model.load_state_dict(start)
    train_stage(TextStage(model, batches), config, tmp_path / "halves", seed=7)

    whole, halves = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "halves")
    assert (
        whole.keys()
        == halves.keys()
        == {"weights.safetensors", "optimizer.safetensors", "average.safetensors"}
    )
    for file, tensors in whole.items():
        differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, halves[file][name])]
        assert not differing, f"{file}: {differing[:3]}"
    assert all(torch.equal(tensor, handed_on[name]) for name, tensor in model.state_dict().items())


def test_a_batch_is_a_function_of_seed_and_step(processor):
    kinds = (
        BatchKind(share=1, batch_size=2, tasks={"interview": 1}),
        BatchKind(share=1, batch_size=3, tasks={"story": 1}),
    )
    batches, again = (DocumentBatches(processor, kinds, seed=4) for _ in range(2))
    assert batches(5).document_ids == again(5).document_ids
    assert torch.equal(batches(5).batch.pixel_values, again(5).batch.pixel_values)
    assert batches(5).document_ids != batches(6).document_ids
    assert DocumentBatches(processor, kinds, seed=5)(5).document_ids != batches(5).document_ids


def test_images_of_a_pool_are_what_the_model_would_paint_from(model, processor):
    """The stage's own path (pools) computes the loss that the model's forward computes."""
    documents = DocumentBatches(
        processor, (BatchKind(share=1, batch_size=2, tasks={"story": 1}),), seed=3, target_pixels=True
    )
    model.eval()
    inputs = documents(0).batch
    stage = ImageStage(model, documents, batch_size=1, pool_batches=1, repeats=1)
    tasks = stage.read(documents(0))
    assert len(tasks) == inputs.image_target.sum()
    with torch.no_grad():
        hidden = model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            pixel_values=inputs.pixel_values,
            image_start=inputs.image_start,
        ).hidden
    first_image = int(inputs.image_start[0, 0])
    torch.testing.assert_close(tasks[0].context, hidden[0, : first_image + 1].flip(0), rtol=0.05, atol=0.05)
    assert [len(task.earlier) for task in tasks][:3] == [0, 1, 2]


class Diverging:
    """A stage whose loss is not a number from step 2 on."""

    name = "diverging"

    def __init__(self):
        self.part = nn.Linear(2, 1)

    def trained_parts(self):
        return {"part": self.part}

    def make_batch(self, step):
        return step

    def compute_losses(self, batch):
        loss = self.part(torch.ones(1, 2)).sum() * (float("nan") if batch == 2 else 1.0)
        return Losses(loss, {"loss": loss}, {"images": 1}, document_ids=("storyworld-train-1-2",))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    stage = Diverging()
    config = StageConfig(steps=6, learning_rate=1e-2, warmup_steps=1, save_every=1)
    with pytest.raises(NumericalError, match=r"step 2: loss nan.*storyworld-train-1-2") as stopped:
        train_stage(stage, config, tmp_path, seed=0)
    assert stopped.value.exit_code == 5
    assert load_newest_checkpoint(tmp_path).step == 2
    assert all(parameter.isfinite().all() for parameter in stage.part.parameters())


def damage(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def test_only_the_newest_checkpoints_stay_and_a_damaged_one_is_put_aside(tmp_path, caplog):
    config = StageConfig(steps=2, learning_rate=1e-2, save_every=1, log_every=1)
    train_stage(Diverging(), config, tmp_path, seed=0)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]
    damage(tmp_path / "step-00000002")
    assert load_newest_checkpoint(tmp_path).step == 1
    train_stage(Diverging(), replace(config, keep_checkpoints=1), tmp_path, seed=0)
    assert "damaged-step-00000002; going on from step 1" in caplog.text
    names = sorted(path.name for path in tmp_path.glob("*step-*"))
    assert names == ["damaged-step-00000002", "step-00000002"]
    assert [line["step"] for line in losses_of(tmp_path)] == [1, 2], "what is done again is logged once"


def test_a_run_never_starts_again_where_all_its_checkpoints_are_damaged(tmp_path):
    config = StageConfig(steps=2, learning_rate=1e-2, save_every=1)
    train_stage(Diverging(), config, tmp_path, seed=0)
    for step in (1, 2):
        damage(tmp_path / f"step-0000000{step}")
    with pytest.raises(ModelFileError, match=r"step-00000002/weights.*step-00000001/weights"):
        train_stage(Diverging(), config, tmp_path, seed=0)


def test_a_save_that_was_cut_off_is_not_taken_for_a_checkpoint(tmp_path):
    train_stage(Diverging(), StageConfig(steps=2, learning_rate=1e-2), tmp_path, seed=0)
    (tmp_path / "step-00000009").mkdir()  # no manifest
    (tmp_path / ".tmp-step-00000008-1").mkdir()
    assert load_newest_checkpoint(tmp_path).step == 2


def test_the_learning_rate_rises_stays_and_falls_to_nearly_nothing():
    config = StageConfig(steps=100, learning_rate=1.0, warmup_steps=10, decay_fraction=0.3)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[69] == pytest.approx(1.0)
    assert rates[70:] == sorted(rates[70:], reverse=True) and rates[-1] < 0.01


def test_normalised_latents_decode_to_the_same_images(model):
    vae = model.image_decoder.vae.eval()
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        normalise_latents(vae, images)
        after = vae.encode(images).latent_dist
        assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
        assert (after.mean.std((0, 2, 3)) - 1).abs().max() < 1e-3
        torch.testing.assert_close(
            after.std / before.std,
            after.mean.new_ones(1).expand_as(after.std) / before.mean.std((0, 2, 3))[:, None, None],
            rtol=1e-3,
            atol=1e-4,
        )
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-3)


def test_the_vae_learns(model, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    stage = VAEStage(
        model.image_decoder.vae,
        lambda start, count: images,
        batch_size=2,
        detail_weight=4.0,
        kl_weight=1e-5,
    )
    config = StageConfig(steps=30, learning_rate=1e-2, warmup_steps=2, log_every=10)
    train_stage(stage, config, tmp_path, seed=0)
    lines = losses_of(tmp_path)
    assert lines[-1]["pixel"] < lines[0]["pixel"]


def test_document_batches_carry_their_documents_names(processor):
    batch = DocumentBatches(processor, (ONE_DRAWING,), seed=0)(0)
    assert isinstance(batch, DocumentBatch)
    assert batch.document_ids == ("storyworld-train-0-0",)
