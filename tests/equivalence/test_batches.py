"""Documents continued in one batch are those continued alone: the same words, the same pictures but for what
the last bits of the numbers behind them do.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Finished, ImageDone
from mm_interleaved.generation.image_batch import join_earlier_images
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.image_decoder import ImageDecoder
from tiny import tiny_model, tiny_processor

LEVELS = 1
"""Of 255, by which a pixel may be another."""
CLOSE = 1e-5


def picture(seed):
    return Image(
        PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    )


DOCUMENTS = [
    Document(id="a", parts=[Text("Hi")]),
    Document(id="b", parts=[Text("A longer one "), picture(0), picture(1), Text(".")]),
    Document(id="c", parts=[picture(2)], layout="T"),
    Document(id="d", parts=[picture(3), Text("x"), picture(4), picture(5)]),
]
FAST = {"num_inference_steps": 2, "max_new_tokens": 8, "seed": 3}


@pytest.fixture
def generator():
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config))


def assert_same(found, expected):
    assert [type(part) for part in found.parts] == [type(part) for part in expected.parts]
    for ours, theirs in zip(found.parts, expected.parts, strict=True):
        if isinstance(ours, Text):
            assert ours == theirs
        else:
            assert replace(ours, source=theirs.source, pixel_error=theirs.pixel_error) == theirs
            one, other = (np.asarray(image.load(), np.int16) for image in (ours, theirs))
            assert np.abs(one - other).max() <= LEVELS


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "T I T I"},
        {"layout": "I T", "guidance_scale": 1.0, "scheduler": "unipc"},
        {"layout": "T I", "do_sample": True, "num_candidates": 3, "scheduler": "euler"},
        {"layout": "I I", "negative_prompt": "fog", "context_images": "all", "step_cache": 2},
        {"layout": "I", "report_error": True, "guidance_cache": 2},
        {"layout": "T I", "num_beams": 2, "context_images": "0", "context_strength": 0.5},
        {"layout": "auto", "max_images": 1},
    ],
)
def test_a_batch_gives_what_each_document_gives_alone(generator, settings):
    alone = [generator.generate(document, **FAST, **settings) for document in DOCUMENTS]
    for batch_size in (4, 3):
        together = generator.generate_batch(DOCUMENTS, batch_size=batch_size, **FAST, **settings)
        for found, expected in zip(together, alone, strict=True):
            assert_same(found, expected)


def test_documents_of_a_batch_may_differ_in_every_setting(generator):
    settings = [
        GenerationSettings(layout="T I", **FAST),
        GenerationSettings(layout="I T", scheduler="ddim", **FAST),
        GenerationSettings(layout="I", height=40, width=24, **FAST),
        GenerationSettings(layout="T I", do_sample=True, num_inference_steps=3, max_new_tokens=4),
    ]
    found = {
        place: event.document
        for place, event in generator.stream_batch(DOCUMENTS, settings)
        if isinstance(event, Finished)
    }
    for place, own in enumerate(settings):
        assert_same(found[place], generator.generate(DOCUMENTS[place], own))


def test_what_is_asked_for_at_the_same_time_is_computed_in_one_pass(generator, monkeypatch):
    seen, drawn = Counter(), Counter()
    encode, predict = generator.model.encode_images, ImageDecoder.predict

    def counted_encode(pixels):
        seen[len(pixels)] += 1
        return encode(pixels)

    def counted_predict(decoder, latents, *arguments, **named):
        drawn[len(latents)] += 1
        return predict(decoder, latents, *arguments, **named)

    monkeypatch.setattr(generator.model, "encode_images", counted_encode)
    monkeypatch.setattr(ImageDecoder, "predict", counted_predict)
    events = list(generator.stream_batch(DOCUMENTS, layout="T I", **FAST))
    # All six images of all prompts, then the four pictures that were drawn.
    assert seen == {6: 1, 4: 1}
    assert drawn == {2 * 4: FAST["num_inference_steps"]}
    assert sum(isinstance(event, ImageDone) for _, event in events) == 4


def test_a_document_alone_has_its_images_seen_in_one_pass(generator, monkeypatch):
    seen, encode = [], generator.model.encode_images
    monkeypatch.setattr(
        generator.model, "encode_images", lambda pixels: (seen.append(len(pixels)), encode(pixels))[1]
    )
    generator.generate(DOCUMENTS[3], layout="T", **FAST)
    assert seen == [3]
    generator.score_options(DOCUMENTS[1], ["a", "b"])
    assert seen == [3, 2]


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1, 1), (2, 0, 1), (0, 0), (3, 1, 2)])
def test_pictures_look_at_their_own_earlier_images_in_a_batch(counts):
    model = tiny_model().double()
    decoder, numbers = model.image_decoder, torch.Generator().manual_seed(0)
    latents = torch.randn(len(counts), 4, 8, 8, generator=numbers).double()
    conditioning = torch.randn(len(counts), 4, 16, generator=numbers).double()
    earlier = []
    for count in counts:
        pixels = torch.rand(count, 3, 32, 32, generator=numbers).double()
        pyramid = model.encode_images(pixels).pyramid if count else model.vision.empty_pyramid()
        earlier.append(model.project_earlier_images(pyramid, torch.arange(count)[None]))
    step = torch.tensor(500)
    together = decoder.predict(latents, step, conditioning, join_earlier_images(earlier))
    for place, one in enumerate(earlier):
        own = slice(place, place + 1)
        alone = decoder.predict(latents[own], step, conditioning[own], one)
        assert (together[own] - alone).abs().max() < CLOSE
