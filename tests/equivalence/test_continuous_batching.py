"""Texts and images that join a running batch, and leave it, are those written and denoised alone."""

import numpy as np
import pytest
import torch

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.generation.batched import ContinuousBatch
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Finished, ImageDone, ImageStarted, TextDelta
from mm_interleaved.generation.image_batch import ImageBatch, ImageRequest
from mm_interleaved.generation.logits import TextRules
from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import TextRequest
from mm_interleaved.generation.text_batch import TextBatch
from mm_interleaved.models.image_decoder import ImageDecoder
from text_parts import write_text
from tiny import BOS, EOS, tiny_model, tiny_processor

EXACT = 1e-10
SPECIAL = (EOS, 298, 299)


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


# ---- Texts ----

TEXTS = [
    ({}, {"max_new_tokens": 16, "stop_ids": (EOS,)}),
    ({"do_sample": True, "temperature": 3.0}, {"max_new_tokens": 10, "stop_ids": (EOS, 298)}),
    ({"repetition_penalty": 1.7}, {"max_new_tokens": 14, "min_new_tokens": 9, "stop_ids": (EOS, 298)}),
    ({"do_sample": True, "top_k": 9, "compat": "released"}, {"max_new_tokens": 19, "stop_ids": (EOS,)}),
    ({"num_beams": 2}, {"max_new_tokens": 5, "stop_ids": (EOS,)}),
    ({"cache_implementation": "static"}, {"max_new_tokens": 20, "stop_ids": (EOS,)}),
]


def text_requests(model):
    """Of other lengths, settings and rules each; some with images, one of them at the end."""
    pixels = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    requests = []
    for number, (settings, rules) in enumerate(TEXTS):
        session = InterleavedSession(model, 128 if "cache_implementation" in settings else None)
        session.append_text([BOS, *range(3, 5 + 2 * number)])
        for image in pixels[: number % 3]:
            session.append_image(image)
        forbidden = tuple(i for i in SPECIAL if i not in rules["stop_ids"])
        requests.append(
            TextRequest(
                session,
                GenerationSettings(**settings),
                TextRules(forbidden_ids=forbidden, **rules),
                torch.Generator().manual_seed(number),
            )
        )
    return requests


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 3, 1, 4, 2, 0)])
def test_texts_that_join_at_any_run_are_those_written_alone(model, order):
    alone, together = text_requests(model), text_requests(model)
    expected = [[i for run in write_text(each) for i in run.ids] for each in alone]
    batch, found, coming = TextBatch(run_length=2), {}, list(order)
    while len(batch) or coming:
        if coming:
            number = coming.pop(0)
            batch.add(number, together[number])
            found[number] = []
        for number, run in batch.step():
            found[number] += run.ids
    assert [found[number] for number in range(len(TEXTS))] == expected
    assert max(batch.sizes) >= 3
    for one, other in zip(alone, together, strict=True):
        assert (one.session.read() - other.session.read()).abs().max() < EXACT


@torch.no_grad()
def test_texts_of_any_kind_take_turns(model):
    batch, served = TextBatch(run_length=2), []
    for number, request in enumerate(text_requests(model)):
        if number not in (4,):
            batch.add(number, request)
    for _ in range(6):
        served.append({number for number, _ in batch.step()})
    # Rows of one pass, and the one whose cache is static, which shares none with them.
    assert served[:4] == [{0, 1, 2, 3}, {5}, {0, 1, 2, 3}, {5}]


# ---- Images ----

IMAGES = [
    {"num_inference_steps": 4},
    {"num_inference_steps": 6, "scheduler": "euler"},
    {"num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": "unipc"},
    {"num_inference_steps": 5, "step_cache": 2},
    {"num_inference_steps": 5, "step_cache": 2, "guidance_cache": 2},
    {"num_inference_steps": 4, "context_strength": 0.5},
    {"num_inference_steps": 4, "scheduler": "lcm"},
]


@torch.no_grad()
def image_requests(model):
    numbers = torch.Generator().manual_seed(0)
    requests = []
    for number, settings in enumerate(IMAGES):
        count = number % 3
        pixels = torch.rand(count, 3, 32, 32, generator=numbers).double()
        pyramid = model.encode_images(pixels).pyramid if count else model.vision.empty_pyramid()
        requests.append(
            ImageRequest(
                decoder=model.image_decoder,
                scheduler_config=model.config.scheduler_config,
                settings=GenerationSettings(**settings),
                seeds=[number, 100 + number] if number % 4 == 1 else [number],
                size=(32, 24) if number == 2 else (32, 32),
                conditioning=torch.randn(1, 4, 16, generator=numbers).double(),
                negative_conditioning=None,
                earlier=model.project_earlier_images(pyramid, torch.arange(count)[None]),
            )
        )
    return requests


def denoised(requests, arrivals, leaving=(), at_once=8):
    """The images of each request that comes at a step and does not leave, and the batch."""
    batch, found, step = ImageBatch(at_once), {}, 0
    coming = dict(zip(range(len(requests)), arrivals, strict=True))
    while len(batch) or coming:
        for number in [number for number, begin in coming.items() if begin <= step]:
            del coming[number]
            batch.add(number, requests[number])
        for number, after in dict(leaving).items():
            if after == step:
                batch.drop(number)
        if len(batch):
            for number, images in batch.step():
                found[number] = [np.asarray(image, np.int16) for image in images]
        step += 1
    return found, batch


@pytest.mark.parametrize("at_once", [8, 2])
def test_images_that_join_at_any_step_are_those_denoised_alone(model, at_once):
    requests = image_requests(model)
    found, batch = denoised(requests, [0, 1, 1, 2, 3, 3, 5], at_once=at_once)
    for number, request in enumerate(requests):
        alone, _ = denoised([request], [0])
        assert len(found[number]) == len(request.seeds)
        for ours, theirs in zip(found[number], alone[0], strict=True):
            assert np.abs(ours - theirs).max() == 0, "in double precision, to the bit"
    assert 2 <= max(batch.sizes) <= at_once


def test_an_image_that_is_dropped_takes_no_further_pass(model, monkeypatch):
    requests, rows = image_requests(model), []
    predict = ImageDecoder.predict

    def counted(decoder, latents, *arguments, **named):
        rows.append(len(latents))
        return predict(decoder, latents, *arguments, **named)

    monkeypatch.setattr(ImageDecoder, "predict", counted)
    found, _ = denoised([requests[0], requests[6]], [0, 0], leaving={0: 2})
    assert set(found) == {1}
    # Guided: two rows an image; both for two steps, then one alone.
    assert rows == [4, 4, 2, 2]


# ---- Documents ----


def test_text_goes_on_between_denoising_steps_and_nobody_starves():
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    batch, events = ContinuousBatch(), []
    picture = {"layout": "I", "num_inference_steps": 30, "guidance_scale": 1.0}
    batch.add(generator.begin(Document(id="slow", parts=[]), **picture).steps())
    for _ in range(5):
        events += list(batch.step())
    batch.add(generator.begin(Document(id="quick", parts=[Text("Hi")]), layout="T", max_new_tokens=9).steps())
    while len(batch):
        events += list(batch.step())
    kinds = [(number, type(event)) for number, event in events]
    assert kinds.index((1, Finished)) < kinds.index((0, ImageDone))
    assert kinds[0] == (0, ImageStarted) and (1, TextDelta) in kinds
    assert batch.images.sizes == {1: 30}


@pytest.mark.parametrize("steps", range(7))
def test_whoever_is_cancelled_at_any_step_leaves_the_others_as_they_are(steps):
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    picture = Image(np_image(0))
    settings = {"layout": "T I T", "num_inference_steps": 2, "max_new_tokens": 8, "seed": 1}
    documents = [Document(id=name, parts=[Text(name), picture]) for name in ("a", "b")]
    batch, last = ContinuousBatch(), {}
    numbers = [batch.add(generator.begin(document, **settings).steps()) for document in documents]
    for _ in range(steps):
        last |= dict(batch.step())
    batch.cancel(numbers[0])
    assert len(batch) == 1
    while len(batch):
        for number, event in batch.step():
            assert number == numbers[1]
            last[number] = event
    batch.cancel(numbers[1])
    expected = generator.generate(documents[1], **settings)
    for ours, theirs in zip(last[numbers[1]].document.parts, expected.parts, strict=True):
        if isinstance(ours, Text):
            assert ours == theirs
        else:
            one, other = (np.asarray(image.load(), np.int16) for image in (ours, theirs))
            assert np.abs(one - other).max() <= 1


def np_image(seed):
    from PIL import Image as PILImage

    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))
