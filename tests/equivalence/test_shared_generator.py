"""Requests of several threads to one generator, an adapter in its layers: each gets what it gets alone, to
the bit; and what loading and generating leave behind in the process.
"""

import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text, document_to_record
from mm_interleaved.documents.images import to_png
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.acceleration import load_adapter
from mm_interleaved.training.adaptation import add_low_rank
from mm_interleaved.training.config import LoraConfig
from tiny import tiny_model, tiny_processor

PICTURE = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
DOCUMENT = Document(id="d", parts=[Text("hello"), Image(PICTURE), Text(" you")])
DRAW = {"num_inference_steps": 3, "max_new_tokens": 8}
REQUESTS = [
    {"layout": "I"},
    {"layout": "I", "report_error": True, "scheduler": "lcm"},
    {"layout": "T I", "do_sample": True, "seed": 3, "scheduler": "euler"},
    {"layout": "T I", "step_cache": 2, "guidance_cache": 2, "report_error": True},
    {"layout": "I", "num_candidates": 2, "negative_prompt": "fog"},
    {"layout": "T", "num_beams": 3, "repetition_penalty": 2.0},
]


def answer(generator, settings):
    completed = generator.generate(DOCUMENT, **DRAW, **settings)
    return document_to_record(completed, lambda image, _: to_png(image.load()).hex())


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """With an adapter in its U-Net, and an assistant that counts how many guesses came out right."""
    folder = tmp_path_factory.mktemp("adapter")
    trained = tiny_model()
    handle = add_low_rank(trained, LoraConfig(rank=2, alpha=8, parts=("unet",)))
    with torch.no_grad():
        for index, (name, weight) in enumerate(trained.named_parameters()):
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(index))
    handle.save_pretrained(folder)
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config), adapter=load_adapter(model, folder))


def test_threads_that_share_a_generator_get_what_they_get_alone_to_the_bit(generator):
    alone = [answer(generator, settings) for settings in REQUESTS]
    state = {name: value.clone() for name, value in generator.model.state_dict().items()}
    random_state = torch.get_rng_state()
    barrier = threading.Barrier(len(REQUESTS))

    def ask(settings):
        barrier.wait()
        return answer(generator, settings)

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        assert list(pool.map(ask, REQUESTS)) == alone
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in generator.model.state_dict().items())


def test_an_exact_picture_is_drawn_by_other_modules_on_the_same_weights(generator):
    stock, adapted = generator.adapter.without, generator.model.image_decoder
    ours = {name: weight.data_ptr() for name, weight in stock.named_parameters()}
    theirs = {
        name.replace(".base_layer", ""): weight.data_ptr()
        for name, weight in adapted.named_parameters()
        if "lora_" not in name
    }
    assert ours == theirs
    assert {id(module) for module in stock.modules()}.isdisjoint(map(id, adapted.modules()))
    assert [type(module) for module in stock.modules()] == [
        type(module) for module in tiny_model().image_decoder.modules()
    ]
    # What moves the one moves the other.
    twice = adapted.double()
    assert all(weight.dtype == torch.float64 for weight in stock.parameters())
    twice.float()


@pytest.mark.parametrize("schedule", ["heuristic", "constant"])
def test_an_assistant_is_as_it_was_after_a_request(schedule):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny_model()
    assistant = LlamaForCausalLM(
        LlamaConfig(**{**model.config.text_config.to_dict(), "num_hidden_layers": 1})
    )
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    before = assistant.generation_config.to_dict()
    generator = InterleavedGenerator(model, tiny_processor(model.config), assistant_model=assistant)
    own = generator.assistant_model.generation_config.to_dict()
    generator.generate(DOCUMENT, layout="T", max_new_tokens=20)
    assert assistant.generation_config.to_dict() == before
    assert generator.assistant_model.generation_config.to_dict() == own
    assert own["num_assistant_tokens"] == 5
    assert next(generator.assistant_model.parameters()) is next(assistant.parameters())


def test_loading_and_generating_leave_the_process_as_it_was():
    from transformers.utils import logging

    logging.enable_progress_bar()
    filters = list(warnings.filters)
    before = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), torch.get_num_threads()
    generator = load_generator(find_model("storyworld"))
    generator.generate(Document(id="d", parts=[Image(PICTURE)]), layout="T", max_new_tokens=1)
    assert (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), torch.get_num_threads()) == before
    assert warnings.filters == filters and logging.is_progress_bar_enabled()
    # With a hook it stands in a circle, which only a search for garbage finds.
    add_hook_to_module(generator.model, ModelHook())
    model = weakref.ref(generator.model)
    del generator
    gc.collect()
    assert model() is None


def test_threads_that_open_images_leave_the_filters_of_warnings_alone():
    filters, data = list(warnings.filters), to_png(PICTURE)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: Image(data).load(), range(200)))
    assert warnings.filters == filters
