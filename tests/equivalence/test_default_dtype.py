"""torch's default dtype changes nothing: every number that is made names its own."""

import threading

import numpy as np
import pytest
import torch

from mm_interleaved import Document, InterleavedGenerator, Text
from mm_interleaved.generation.default_dtype import single_precision
from mm_interleaved.generation.schedulers import SCHEDULERS
from tiny import BOS, image_ids, tiny_model, tiny_processor


@pytest.fixture(params=[torch.float64, torch.float16], ids=str)
def other_default(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


def with_default(dtype, call):
    torch.set_default_dtype(dtype)
    try:
        return call()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_whole_generation_is_the_same_to_the_bit(other_default, scheduler):
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    document = Document(id="d", parts=[Text("hello")])
    settings = {"max_new_tokens": 4, "num_inference_steps": 4, "scheduler": scheduler, "do_sample": True}

    def run():
        made = generator.generate(document, layout="I T I", **settings)
        scores = generator.score_options(document, ["a", "bc"])
        return [p.text if isinstance(p, Text) else np.asarray(p.load()).tolist() for p in made.parts], scores

    expected = run()
    assert with_default(other_default, run) == expected


def test_released_beams_are_the_same_to_the_bit(other_default):
    model = tiny_model(compat="released")
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    document = Document(id="d", parts=[Text("hello")])

    def run():
        return generator.generate(document, layout="T", num_beams=3, max_new_tokens=5).parts[-1].text

    expected = run()
    assert with_default(other_default, run) == expected


def test_a_training_step_is_the_same_to_the_bit(other_default):
    def run(model):
        ids = torch.tensor([[BOS, 5, 6, *image_ids(model.config), 9, *image_ids(model.config), 7]])
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float32)
        torch.manual_seed(1)
        output = model(input_ids=ids, pixel_values=pixels, target_pixel_values=pixels, text_target=ids < 298)
        output.loss.backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.step()
        return output.loss.item(), [parameter.detach().clone() for parameter in model.parameters()]

    loss, weights = run(tiny_model().train())
    model = tiny_model().train()
    other_loss, other_weights = with_default(other_default, lambda: run(model))
    assert loss == other_loss
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


def test_threads_give_the_default_back_together(other_default):
    torch.set_default_dtype(other_default)
    inside, leaving = threading.Barrier(3), threading.Barrier(3)
    found = []

    def call():
        with single_precision():
            inside.wait()
            found.append(torch.get_default_dtype())
            leaving.wait()

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [torch.float32] * 3
    assert torch.get_default_dtype() == other_default
