"""The recipe with boards: what conditionings say of them, and the stage in which the U-Net learns to look."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.registry import RECIPES
from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import (
    IMAGE_ONLY,
    NO_LABEL,
    NUM_VALUES,
    known_labels,
    true_labels,
)
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches, training_images
from mm_interleaved.recipes.storyworld.board_supervision import (
    BOARD_VALUES,
    NUM_BOARD_VALUES,
    WAYS,
    board_labels,
)
from mm_interleaved.recipes.storyworld.recipe import BOARD_TEXT_BATCHES, LOOKING_BATCHES
from mm_interleaved.recipes.storyworld.settings import SizesConfig, StoryWorldConfig
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.unet_stage import LookingStage
from mm_interleaved.recipes.storyworld.vision_stage import PixelProbe, VisionStage
from mm_interleaved.storyworld.detail.boards import detail_from_record
from mm_interleaved.storyworld.renderer import render_batch
from mm_interleaved.storyworld.training_documents import training_document
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.settings import StageConfig

PAIRS = BatchKind(share=1, batch_size=2, tasks={"detail_edit": 1, "detail_story": 1})
POOL = {"batch_size": 3, "pool_batches": 1, "repeats": 3, "boards": True}


def words(labels):
    return tuple(
        None if label == NO_LABEL else values[label]
        for values, label in zip(BOARD_VALUES.values(), labels.tolist(), strict=True)
    )


def boards_of(document):
    return [detail_from_record(record).board for record in document.meta["scenes"]]


def way(board):
    return f"{board.scale} {board.height} {board.position}"


def test_an_image_of_a_story_is_told_how_its_board_hangs_and_hung():
    story = training_document(0, 3, {"detail_story": 1})
    boards, labels = boards_of(story), board_labels([story])
    assert words(labels[0]) == (f"{boards[0].kind} {way(boards[0])}", "no board")
    assert words(labels[1]) == (f"{boards[1].kind} {way(boards[1])}", way(boards[0]))
    assert {way(board) for board in boards} <= set(WAYS)


def test_images_that_nothing_announces_and_maps_have_no_labels():
    edit, map_of = (training_document(0, 3, {task: 1}) for task in ("detail_edit", "detail_segmentation"))
    assert words(board_labels([edit])[0]) == (None, None)
    boards, labels = boards_of(map_of), board_labels([map_of])
    assert words(labels[1]) == (None, None)
    assert (true_labels([map_of])[1] == NO_LABEL).all() and (true_labels([map_of])[2] != NO_LABEL).any()
    assert words(labels[2]) == (f"{boards[2].kind} {way(boards[2])}", way(boards[0]))
    assert words(board_labels([training_document(0, 1, {"draw": 1})])[0]) == ("no board", "no board")


def test_somebody_in_a_map_is_not_taken_for_who_stood_in_the_image_before():
    badges = [n for n, name in enumerate(_names()) if name.startswith(IMAGE_ONLY)]
    for index in range(12):
        labels = known_labels([training_document(0, index, {"detail_segmentation": 1})])
        assert (labels[:, badges] == NO_LABEL).all()


def _names():
    from mm_interleaved.recipes.storyworld.attribute_supervision import ATTRIBUTES

    return ATTRIBUTES


def test_further_attributes_leave_the_embedding_of_the_others_alone():
    labels = torch.randint(0, 3, (5, len(NUM_VALUES)))
    plain, more = AttributeEmbedding(16, 128), AttributeEmbedding(16, 128, more_values=NUM_BOARD_VALUES)
    extra = torch.randint(0, 15, (5, 2))
    with_extra = more.encode(torch.cat([labels, extra], 1))
    assert torch.equal(with_extra[:, :15], plain.encode(labels)[:, :15])
    logits = more.logits(with_extra)[:, sum(NUM_VALUES) :].split(NUM_BOARD_VALUES, 1)
    assert torch.equal(torch.stack([each.argmax(1) for each in logits], 1), extra)
    losses = more.losses(with_extra, torch.cat([labels, extra], 1))
    assert losses["attributes"] < 0.2 and losses["distance"] == 0
    wrong = more.losses(with_extra, torch.cat([labels, (extra + 1) % 15], 1))
    assert wrong["attributes"] > losses["attributes"] and wrong["distance"] > 0


def test_a_conditioning_without_room_for_boards_is_refused():
    with pytest.raises(UsageError, match="num_conditioning 15: expected at least 16"):
        AttributeEmbedding(15, 128, more_values=NUM_BOARD_VALUES)


def test_the_looking_stage_resumes_to_the_bit_and_leaves_reading_alone(board_model, processor, tmp_path):
    batches = DocumentBatches(processor, (PAIRS,), seed=0, target_pixels=True)
    start = {name: tensor.clone() for name, tensor in board_model.state_dict().items()}
    config = StageConfig(steps=4, learning_rate=3e-3, warmup_steps=1, save_every=2, log_every=2)
    ends = []
    for folder, goes in ((tmp_path / "whole", (4,)), (tmp_path / "parts", (2, 4))):
        board_model.load_state_dict(start)
        for steps in goes:
            stage = LookingStage(board_model, batches, **POOL)
            train_stage(stage, replace(config, steps=steps), folder, seed=0)
        ends.append({p.name: load_file(p) for p in sorted((folder / "step-00000004").glob("*.safetensors"))})
    assert ends[0].keys() == ends[1].keys()
    for name, tensors in ends[0].items():
        assert all(torch.equal(tensor, ends[1][name][key]) for key, tensor in tensors.items())
    changed = {n.split(".")[0] for n, t in board_model.state_dict().items() if not torch.equal(t, start[n])}
    assert changed == {"image_decoder"}


def test_conditionings_of_the_looking_stage_never_hold_what_only_images_show(board_model, processor):
    documents = DocumentBatches(processor, (PAIRS,), seed=0, target_pixels=True)(0)
    stage = LookingStage(board_model, DocumentBatches(processor, (PAIRS,), seed=0), **POOL)
    contexts = stage.read_contexts(documents)
    blind = [n for n, name in enumerate(_names()) if name.startswith(IMAGE_ONLY)]
    other = [context.clone() for context in contexts]
    for context in other:
        context[:, blind] = 0
    assert torch.equal(stage.condition(contexts), stage.condition(other))
    other[-1][:, -1] = (other[-1][:, -1] + 1) % len(WAYS)
    assert not torch.equal(stage.condition(contexts), stage.condition(other))


def test_the_text_stage_learns_how_boards_hang(board_model, processor):
    batch = DocumentBatches(processor, (PAIRS,), seed=0)(0)
    losses = TextStage(board_model, lambda step: batch, boards=True).compute_losses(batch)
    assert losses.named["attributes"].isfinite() and losses.total.requires_grad


def test_pixels_are_told_from_cells_by_linear_probes(model):
    stage = VisionStage(model.vision, seed=0, batch_size=2, boards=True, pixel_weight=2.0)
    losses = stage.compute_losses(stage.make_batch(0))
    others = sum(loss for name, loss in losses.named.items() if name not in ("badge", "pixels"))
    torch.testing.assert_close(losses.total, others + 2 * losses.named["pixels"])
    losses.named["pixels"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.vision.parameters())


def test_a_pixel_probe_asks_each_cell_for_its_own_pixels():
    probe = PixelProbe(3 * 4, 2)
    with torch.no_grad():
        torch.nn.init.eye_(probe.linear.weight)
        probe.linear.bias.zero_()
    pixels = torch.rand(2, 3, 8, 8)
    cells = torch.nn.functional.pixel_unshuffle(2 * pixels - 1, 2)
    # Of cells that the norm leaves as they are, it tells exactly what they are.
    cells = torch.nn.functional.layer_norm(cells.movedim(1, -1), (12,)).movedim(-1, 1)
    told = torch.nn.functional.pixel_shuffle(cells, 2)
    assert probe(cells, (told + 1) / 2) < 1e-6 < probe(cells.flip(-1), (told + 1) / 2)


def test_two_of_three_training_images_show_a_board_and_the_others_are_as_ever():
    _, images = training_images(5, 0, 6, boards=True)
    plain = render_batch(5, 0, 6)
    assert [bool((one == other).all()) for one, other in zip(images, plain, strict=True)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    assert (training_images(5, 0, 3)[1] == plain[:3]).all()


def test_the_recipe_differs_from_that_of_the_shipped_model_where_it_should():
    config = RECIPES["storyworld-boards"].settings()
    assert config.boards and config.sizes.image_levels == (0, 1, 2)
    assert not StoryWorldConfig().boards and SizesConfig().image_levels == (1, 2)
    with pytest.raises(UsageError, match="image_levels"):
        SizesConfig(image_levels=(1, 1))


@pytest.mark.parametrize("kinds", [BOARD_TEXT_BATCHES, LOOKING_BATCHES])
def test_every_kind_of_batch_of_the_recipe_can_be_made(kinds, processor):
    batches = DocumentBatches(processor, kinds, seed=0)
    for kind in kinds:
        small = replace(kind, batch_size=1)
        assert replace_kinds(batches, small).documents(0)[0].parts


def replace_kinds(batches, kind):
    return DocumentBatches(batches.processor, (kind,), seed=batches.seed)
