"""Where an image decoder has to look: places out of the truth, and a loss that leads there."""

import numpy as np
import pytest
import torch

from mm_interleaved.documents.document import Image
from mm_interleaved.ops import SamplingPlan
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches
from mm_interleaved.recipes.storyworld.looking_supervision import (
    finest_maps,
    looking_loss,
    places_before,
    recorded_plans,
)
from mm_interleaved.recipes.storyworld.unet_stage import LookingStage
from mm_interleaved.storyworld.detail.boards import detail_from_record
from mm_interleaved.storyworld.training_documents import training_document

SIZE = 16


def pixels_of(document):
    return [np.asarray(part.load()).astype(int) for part in document.parts if isinstance(part, Image)]


def stories(task, count):
    return [training_document(7, index, {task: 1}) for index in range(count)]


def test_a_place_shows_the_same_patch_wherever_and_however_large_the_board_was():
    """Read at the finest grid, one place a pixel, where the light is the same and nothing hides the board."""
    checked = 0
    for story in stories("detail_story", 30):
        before, now = (detail_from_record(record) for record in story.meta["scenes"][:2])
        if before.scene.time != now.scene.time or before.board.kind != "quilt":
            continue
        one, other = pixels_of(story)[:2]
        places = places_before(story, 1, 0, 64).view(64, 64, 2)
        left, top = now.board.corner
        side = 24 * (2 if now.board.scale == "large" else 1)
        x, y = (places[top : top + side, left : left + side] * 64).floor().long().unbind(-1)
        same = (one[y, x] == other[top : top + side, left : left + side]).all(-1)
        assert same.mean() > 0.6, "all but what figures hide"
        checked += 1
    assert checked >= 3


def test_a_place_shows_the_same_badge_wherever_its_wearer_stood():
    from mm_interleaved.storyworld.renderer import badge_box
    from mm_interleaved.storyworld.world import scene_from_record

    checked = 0
    for story in stories("story", 12):
        before, now = (scene_from_record(record) for record in story.meta["scenes"][:2])
        one, other = pixels_of(story)[:2]
        places = places_before(story, 1, 0, 64).view(64, 64, 2)
        was_there = {figure.character.name for figure in before.figures}
        hidden = {prop.position for scene in (before, now) for prop in scene.props}
        for figure in now.figures:
            if figure.character.name not in was_there or hidden:
                continue
            left, top, right, bottom = badge_box(figure)
            x, y = (places[top : bottom + 1, left : right + 1] * 64).floor().long().unbind(-1)
            assert (one[y, x] == other[top : bottom + 1, left : right + 1]).all()
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize(
    ("task", "number", "before"), [("segmentation", 1, 0), ("detail_segmentation", 2, 1)]
)
def test_nothing_is_to_be_looked_for_in_a_map(task, number, before):
    assert places_before(stories(task, 1)[0], number, before, SIZE).isnan().all()


def test_a_document_without_scenes_has_no_places():
    from dataclasses import replace

    assert places_before(replace(stories("story", 1)[0], meta={}), 1, 0, SIZE).isnan().all()


def plan_at(location, weight):
    """(I, Q, H, K L, P, 2) and (I, Q, H, K L, P): one head, one level."""
    return SamplingPlan(location[:, :, None], weight[:, :, None], 1 - weight.sum((-1, -2))[:, :, None])


def test_the_loss_leads_offsets_and_weights_to_the_place_in_the_image_that_has_it():
    place = torch.full((1, 2, 4, 2), torch.nan)  # two images, of which the second has the thing
    place[:, 1] = torch.tensor([0.2, 0.7])
    location = torch.full((1, 4, 2, 3, 2), 0.9).requires_grad_()
    logits = torch.zeros(1, 4, 2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([location, logits], lr=0.02)
    for _ in range(200):
        weight = logits.flatten(2).softmax(-1).view_as(logits)
        optimizer.zero_grad()
        loss = looking_loss(plan_at(location, weight), place)
        loss.backward()
        assert location.grad[:, :, 0].abs().max() == 0
        optimizer.step()
    assert loss < 0.05 and weight[:, :, 1].sum(-1).min() > 0.9
    nearest = (location[:, :, 1] - torch.tensor([0.2, 0.7])).abs().amax(-1)
    assert (nearest * weight[:, :, 1]).sum(-1).max() < 0.2


def test_cells_without_a_place_do_not_count_and_none_at_all_is_zero():
    location, weight = torch.rand(1, 4, 1, 3, 2), torch.full((1, 4, 1, 3), 1 / 3)
    place = torch.full((1, 1, 4, 2), torch.nan)
    assert looking_loss(plan_at(location, weight), place) == 0
    place[:, :, 1] = 0.5
    once = looking_loss(plan_at(location, weight), place)
    location[:, [0, 2, 3]] = 0.1
    assert looking_loss(plan_at(location, weight), place) == once > 0


def test_the_stage_adds_the_loss_of_images_that_see_any(board_model, processor):
    kinds = (BatchKind(share=1, batch_size=3, tasks={"draw": 1, "detail_edit": 1, "detail_story": 2}),)
    stage = LookingStage(
        board_model, DocumentBatches(processor, kinds, seed=1, target_pixels=True),
        batch_size=6, pool_batches=2, repeats=1, boards=True, looking_weight=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = stage.read_pool(0)
    assert {len(example.earlier) for example in batch} > {0, 1}
    losses = stage.compute_losses(batch)
    torch.testing.assert_close(losses.total, losses.named["image"] + 0.5 * losses.named["looking"])
    losses.named["looking"].backward()
    last = finest_maps(board_model.image_decoder)[-1]
    assert last.synchronizer.sampling_offsets.bias.grad.abs().max() > 0


def test_recording_changes_nothing(board_model, processor):
    kinds = (BatchKind(share=1, batch_size=2, tasks={"detail_edit": 1}),)
    losses = []
    for weight in (0.0, 1e-30):
        stage = LookingStage(
            board_model, DocumentBatches(processor, kinds, seed=1, target_pixels=True),
            batch_size=2, pool_batches=1, repeats=1, boards=True, looking_weight=weight,
        )  # fmt: skip
        torch.manual_seed(0)
        losses.append(stage.compute_losses(stage.read_pool(0)).named["image"])
    assert losses[0] == losses[1]
    with recorded_plans([]) as plans:
        assert plans == []
