"""Every stage computes where its model lies, and gives the numbers that it gives on the CPU."""

import pytest
import torch
from elsewhere import ELSEWHERE, TwoDevicesError, elsewhere

from mm_interleaved.devices import rank_device
from mm_interleaved.errors import UsageError
from mm_interleaved.recipes.storyworld.batches import BatchKind, DocumentBatches, storyworld_pixels
from mm_interleaved.recipes.storyworld.image_stage import ImageStage
from mm_interleaved.recipes.storyworld.text_stage import TextStage
from mm_interleaved.recipes.storyworld.unet_stage import UNetStage
from mm_interleaved.recipes.storyworld.vae_stage import VAEStage, normalise_latents
from mm_interleaved.recipes.storyworld.vision_stage import VisionStage
from mm_interleaved.training.computation import device_of
from studies.ablation.slot_stage import SlotStage

KINDS = (
    BatchKind(share=1, batch_size=2, tasks={"edit": 1}),
    BatchKind(share=1, batch_size=1, tasks={"story": 1}, is_text_only=True),
)
POOL = {"batch_size": 3, "pool_batches": 1, "repeats": 2, "badge_weight": 20.0}


def documents(processor):
    return DocumentBatches(processor, KINDS, seed=1, target_pixels=True)


STAGES = {
    "vae": lambda model, _: VAEStage(
        model.image_decoder.vae, storyworld_pixels(1), batch_size=1, detail_weight=4.0, kl_weight=0.0
    ),
    "vision": lambda model, _: VisionStage(model.vision, seed=0, batch_size=2),
    "slots": lambda model, _: SlotStage(model.vision, seed=0, batch_size=2),
    "text": lambda model, processor: TextStage(model, documents(processor)),
    "unet": lambda model, processor: UNetStage(model, documents(processor), **POOL),
    "image": lambda model, processor: ImageStage(model, documents(processor), **POOL),
}


def learn(stage, step):
    torch.manual_seed(step)
    losses = stage.compute_losses(stage.make_batch(step))
    losses.total.backward()
    return losses.total


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_computes_where_its_model_lies(name, make_model, processor, monkeypatch):
    steps = [0]
    if name == "text":
        batches = documents(processor)
        steps = [next(s for s in range(20) if batches.kind_of(s) is kind) for kind in KINDS]
    torch.manual_seed(0)
    stage = STAGES[name](make_model(), processor)
    here = [learn(stage, step).detach() for step in steps]
    torch.manual_seed(0)
    model = make_model()
    with elsewhere(monkeypatch):
        model.to(ELSEWHERE)
        stage = STAGES[name](model, processor)
        there = [learn(stage, step) for step in steps]
        assert {loss.device for loss in there} == {ELSEWHERE}
        for part in stage.trained_parts().values():
            for parameter_name, parameter in part.named_parameters():
                grad = parameter.grad
                assert parameter.device == ELSEWHERE, parameter_name
                assert grad is None or grad.device == ELSEWHERE, parameter_name
        for one, other in zip(here, there, strict=True):
            torch.testing.assert_close(one, other.cpu(), rtol=0.02, atol=0.02)


def test_what_stays_behind_is_found_out(model, monkeypatch):
    stage = SlotStage(model.vision, seed=0, batch_size=1)
    with elsewhere(monkeypatch):
        model.to(ELSEWHERE)
        assert device_of(stage.probe).type == "cpu"
        with pytest.raises(TwoDevicesError):
            learn(stage, 0)


def test_latents_are_normalised_where_the_vae_lies(model, monkeypatch):
    with elsewhere(monkeypatch):
        vae = model.image_decoder.vae.to(ELSEWHERE)
        normalise_latents(vae, torch.rand(2, 3, 32, 32))


def test_a_device_that_is_not_there_is_refused():
    assert rank_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or mps, found 'banana'"):
        rank_device("banana")
    if not torch.cuda.is_available():
        assert rank_device("auto").type == "cpu"
        with pytest.raises(UsageError, match="PyTorch finds no GPU here"):
            rank_device("cuda")
