"""What a stage costs is what its steps do, each kind of them as often as training does it."""

import json
from statistics import mean

import pytest
import torch

from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches
from mm_interleaved.recipes.storyworld.stage_cost import COUNTING, average_flops
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.unet_stage import UNetStage
from mm_interleaved.training.metrics import count_flops
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Losses
from studies.cost import read_cost, with_cost

EDITS = BatchKind(share=1, batch_size=2, tasks={"edit": 1})
STORIES = BatchKind(share=2, batch_size=1, tasks={"story": 1})


def flops_of(stage, step):
    torch.manual_seed(step)
    return count_flops(lambda: stage.compute_losses(stage.make_batch(step)).total.backward())


class Product:
    """A stage of one product, of 3 rows by 4 columns with 4 by 5, and its backward pass."""

    name = "product"

    def __init__(self):
        self.part = torch.nn.Linear(4, 5, bias=False)

    def trained_parts(self):
        return {"part": self.part}

    def make_batch(self, step):
        return torch.ones(3, 4)

    def compute_losses(self, batch):
        loss = self.part(batch).sum()
        return Losses(loss, {"loss": loss}, {"rows": 3})


def test_a_product_is_counted_forward_and_for_the_gradient_of_its_weight():
    stage = Product()
    assert average_flops(stage) == 2 * (2 * 3 * 4 * 5)
    assert stage.part.weight.grad is None


def test_a_pool_is_read_once_for_all_its_steps(model, processor):
    documents = DocumentBatches(processor, (EDITS, STORIES), seed=1, target_pixels=True)
    settings = {"batch_size": 2, "pool_batches": 2, "repeats": 2}
    stage = UNetStage(model, documents, **settings)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    counted = average_flops(stage)
    assert torch.equal(torch.get_rng_state(), before)
    # Training: the first of four steps reads the pool as well.
    assert counted == pytest.approx(mean(flops_of(stage, step) for step in range(4)), rel=1e-9)


def test_each_kind_of_texts_weighs_its_share(model, processor):
    kinds = (EDITS, BatchKind(share=3, batch_size=2, tasks={"draw": 1}, is_text_only=True))
    batches = DocumentBatches(processor, kinds, seed=1)
    stage = TextStage(model, batches)
    steps = [next(s for s in range(40) if batches.kind_of(s) is kind) for kind in kinds]
    edits, blind = (flops_of(stage, step) for step in steps)
    assert edits != blind
    assert average_flops(stage, num_examples=1) == pytest.approx(edits / 4 + 3 * blind / 4, rel=1e-9)


CONFIG = StageConfig(steps=4, learning_rate=1e-3)


def cost_of(folder):
    return json.loads((folder / "cost.json").read_text())


def test_an_old_count_of_a_finished_part_is_made_anew_and_nothing_else_changes(tmp_path):
    with_cost(tmp_path, CONFIG, flops_a_step=lambda: 5.0, work=lambda: None)
    first = cost_of(tmp_path)
    assert first["counting"] == COUNTING and first["flops"] == 20.0
    (tmp_path / "cost.json").write_text(json.dumps({**first, "counting": 1, "flops": 999.0}))
    with_cost(tmp_path, CONFIG, flops_a_step=lambda: 5.0, work=lambda: None)
    assert cost_of(tmp_path) == first
    with_cost(tmp_path, CONFIG, flops_a_step=lambda: 1 / 0, work=lambda: None)
    assert cost_of(tmp_path) == first


def test_a_finished_part_keeps_its_steps_where_fewer_are_asked_for(tmp_path):
    with_cost(tmp_path, CONFIG, flops_a_step=lambda: 5.0, work=lambda: None)
    first = cost_of(tmp_path)
    fewer = StageConfig(steps=2, learning_rate=1e-3)
    with_cost(tmp_path, fewer, flops_a_step=lambda: 1 / 0, work=lambda: None)
    assert cost_of(tmp_path) == first


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "[]", "3", '"x"', '{"steps": "3"}', '{"is_finished": true}', '{"counting": 9}'],
)
def test_a_cost_of_another_form_is_put_aside_and_counted_anew(tmp_path, text, caplog):
    (tmp_path / "cost.json").write_text(text)
    with_cost(tmp_path, CONFIG, flops_a_step=lambda: 5.0, work=lambda: None)
    assert read_cost(tmp_path)["is_finished"] and read_cost(tmp_path)["flops_a_step"] == 5.0
    assert (tmp_path / "damaged-cost.json").read_text() == text and "damaged" in caplog.text
