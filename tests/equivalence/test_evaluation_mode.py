"""What is generated does not depend on the mode that the model was left in, and leaves it as it was."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved import Document, Image, InterleavedGenerator, Text
from mm_interleaved.models.evaluation_mode import evaluation_mode
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import checkpointing_enable
from tiny import BOS, image_ids, tiny_model, tiny_processor

SETTINGS = {"layout": "T I T", "max_new_tokens": 6, "num_inference_steps": 2}


def picture():
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def document():
    return Document(id="d", parts=[Text("hello"), Image(picture())])


def dropping_model():
    """A model that drops activations in training mode, in every part."""
    model = tiny_model()
    for module in model.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.3)
    return model


def modes(model):
    return [module.training for module in model.modules()]


def parts(found):
    return [p.text if isinstance(p, Text) else np.asarray(p.load()).tolist() for p in found.parts]


@pytest.fixture(scope="module", params=["checkpointing", "dropout"])
def training(request):
    model = dropping_model()
    if request.param == "checkpointing":
        checkpointing_enable(model)({"use_reentrant": False})
    return model


def test_training_mode_changes_nothing_that_is_generated(training):
    generator = InterleavedGenerator(training, tiny_processor(training.config))
    ids = torch.tensor([[BOS, 5, 6, *image_ids(training.config), 9]])
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def everything():
        torch.manual_seed(0)
        return (
            parts(generator.generate(document(), **SETTINGS)),
            [parts(d) for d in generator.generate_batch([document(), document()], **SETTINGS)],
            generator.score_options(document(), ["a", "bc"]),
            training.generate(ids, pixel_values=pixels, max_new_tokens=4).tolist(),
        )

    expected = everything()
    training.train()
    training.vision.eval()
    before = modes(training)
    assert everything() == expected
    assert modes(training) == before


def test_whoever_takes_an_event_finds_the_model_as_it_was():
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    model.train()
    for _ in generator.stream(document(), **SETTINGS):
        assert model.training
    stream = generator.stream(document(), **SETTINGS)
    next(stream)
    stream.close()
    assert model.training


def test_threads_leave_the_mode_together():
    model = tiny_model().train()
    inside, done = threading.Barrier(3), threading.Barrier(3)
    found = []

    def call():
        with evaluation_mode(model):
            inside.wait()
            found.append(model.training)
            done.wait()

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False] * 3
    assert all(modes(model))


def test_the_mode_comes_back_after_an_error():
    model = tiny_model().train()
    with pytest.raises(ValueError, match="prompt ids"):
        model.generate()
    assert all(modes(model))


def test_a_cache_that_would_stay_empty_is_refused():
    model = tiny_model()
    checkpointing_enable(model)({"use_reentrant": False})
    model.train()
    cache = PrefixCache(model.config.text_config)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model(input_ids=torch.tensor([[BOS, 5]]), cache=cache)
