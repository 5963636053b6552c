"""Trials of a small U-Net that looks at earlier images: what they learn from, and what is measured."""

import json
import math

import pytest
import torch

from mm_interleaved.cli.main import run
from mm_interleaved.ops import SamplingPlan
from mm_interleaved.recipes.storyworld.looking_supervision import looking_loss
from studies.__main__ import create_app
from studies.image_detail.looking import places_of, weight_on_the_place
from studies.image_detail.scenes import LATENT_SIZE, examples, latents_of, make_pair, right_patches
from studies.image_detail.settings import TASKS, TrialSettings
from studies.image_detail.trial import Trial, run_trial


@pytest.fixture(scope="module")
def held_out():
    return examples("validation", 0, 0, 12, TASKS)


def test_latents_hold_every_patch_that_both_images_show(held_out):
    assert right_patches(held_out.latents, held_out.pairs) == dict.fromkeys(TASKS, 1.0)
    noise = torch.randn(held_out.latents.shape, generator=torch.Generator().manual_seed(0))
    assert all(share < 0.3 for share in right_patches(noise, held_out.pairs).values())


def test_a_patch_stands_where_the_shift_says(held_out):
    """Apart from the light, the earlier image's latents at the shifted place are the later one's."""
    before = latents_of(held_out.earlier)
    for row, pair in enumerate(held_out.pairs):
        if pair.before.scene.time != pair.after.scene.time or pair.task == "edit":
            continue
        (down, right), is_board = pair.shift, held_out.board[row, 0] > 0
        y, x = is_board.nonzero(as_tuple=True)
        same = (held_out.latents[row][:, y, x] - before[row][:, y + down, x + right]).abs().amax(0) < 0.02
        # The figure hides a part, another one in either image.
        assert same.float().mean() > 0.6


def test_the_code_is_blind_to_patches():
    one, other = (make_pair("train", 0, index, "copy") for index in (3, 4))
    assert one.before.board.cells != other.before.board.cells
    batch = examples("train", 0, 3, 1, ("copy",))
    assert batch.labels.shape[1] == len(batch.labels[0]) < len(one.before.board.cells)


def test_weight_on_the_place_is_one_where_all_look_there(held_out):
    count, pixels = len(held_out.pairs), LATENT_SIZE**2
    y, x = torch.meshgrid(*[(torch.arange(LATENT_SIZE) + 0.5) / LATENT_SIZE] * 2, indexing="ij")
    own = torch.stack([x.flatten(), y.flatten()], -1)
    shift = torch.tensor([pair.shift[::-1] for pair in held_out.pairs]) / LATENT_SIZE
    location = (own + shift[:, None])[:, :, None, None, None].expand(count, pixels, 2, 1, 1, 2)
    weight = torch.tensor([1.0, 0.25]).view(1, 1, 2, 1, 1).expand(count, pixels, 2, 1, 1)
    plan = SamplingPlan(location, weight, 1 - weight[..., 0, 0])
    assert weight_on_the_place(plan, held_out) == pytest.approx((0.625, 1.0))
    beside = plan._replace(location=location + 1 / LATENT_SIZE)
    assert weight_on_the_place(beside, held_out) == (0.0, 0.0)
    # Far or near, the loss leads to the place: each cell further costs more.
    far = [plan._replace(location=location + distance / LATENT_SIZE) for distance in (0, 1, 4, 9)]
    losses = [float(looking_loss(each, places_of(held_out))) for each in far]
    assert losses == sorted(losses) and losses[0] == pytest.approx(0.5 * math.log(4), abs=1e-5)


def test_a_trial_without_synchronizers_sees_nothing_of_the_earlier_image(held_out):
    trial = Trial(TrialSettings(looks=False))
    again = held_out.take(torch.arange(12))
    again.earlier.fill_(0.5)
    torch.testing.assert_close(trial.at_once(held_out), trial.at_once(again))


@pytest.mark.parametrize("pyramid", ["encoder", "latents"])
def test_losses_reach_offsets_and_pyramid(pyramid, held_out):
    trial = Trial(TrialSettings(pyramid=pyramid, opening=0.1))
    trial.loss(held_out).backward()
    for block in trial.decoder.synchronizers.skips:
        assert block.synchronizer.sampling_offsets.bias.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in trial.pyramid.parameters())


def test_the_loss_of_looking_reaches_offsets_and_weights(held_out):
    trial = Trial(TrialSettings(looking_weight=1.0))
    trial.loss(held_out).backward()
    # The convolution behind is closed at first, so nothing else reaches these.
    block = trial.decoder.synchronizers.skips[1].synchronizer
    assert block.sampling_offsets.bias.grad.abs().min() > 0
    assert block.attention_logits.bias.grad.abs().max() > 0
    assert trial.decoder.synchronizers.skips[0].synchronizer.sampling_offsets.bias.grad is None or (
        trial.decoder.synchronizers.skips[0].synchronizer.sampling_offsets.bias.grad.abs().max() == 0
    )


def test_steps_that_freeze_the_unet_leave_it_alone():
    settings = TrialSettings(steps=2, frozen_unet_steps=2, pool=16, batch_size=4, seed=3)
    before = {name: value.clone() for name, value in Trial(settings).decoder.unet.state_dict().items()}
    trial, found = run_trial(settings, lambda _: None, every=2, count=6)
    assert all(torch.equal(value, before[name]) for name, value in trial.decoder.unet.state_dict().items())
    assert [one.step for one in found] == [2]


def test_the_command_runs_trials_once_and_writes_a_table(tmp_path, capsys):
    small = ["--set", "steps=2", "--set", "pool=16", "--set", "batch_size=4", "--pairs", "3"]
    command = ["image-detail", "-o", str(tmp_path / "run"), "--trial", "copy-latents", *small]
    assert run(command, create_app) == 0
    assert "right at once: copy 0." in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "copy-latents" / "result.json").read_text("utf-8"))
    assert result["settings"]["steps"] == 2 and result["measurements"][-1]["right_painted"]
    assert run(command, create_app) == 0
    assert "done before" in capsys.readouterr().out
    assert "| copy-latents | 2 |" in (tmp_path / "run" / "table.md").read_text("utf-8")


def test_unknown_trials_are_refused(capsys):
    assert run(["image-detail", "--trial", "copy-latnets"], create_app) == 2
    assert "copy-latents" in capsys.readouterr().err
