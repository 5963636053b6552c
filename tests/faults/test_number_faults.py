"""A model that computes no numbers: one error wherever one would leave it, and only for whoever met it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import NumericalError
from mm_interleaved.generation import diffusion
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Failed, Finished
from mm_interleaved.generation.loading import load_generator
from tiny import tiny_model, tiny_processor

PICTURE = Image(PILImage.fromarray(np.full((32, 32, 3), 99, np.uint8)))
DOCUMENT = Document(id="d", parts=[Text("hello"), PICTURE])
FAST = {"num_inference_steps": 2, "max_new_tokens": 6}
WORDS = [
    {"layout": "T"},
    {"layout": "auto"},
    {"layout": "T", "do_sample": True},
    {"layout": "T", "num_beams": 2},
    {"layout": "T", "num_beams": 2, "compat": "released"},
    {"layout": "T", "prompt_lookup_num_tokens": 3},
    {"layout": "T", "cache_implementation": "static"},
]
PICTURES = [
    {"layout": "I"},
    {"layout": "I", "num_candidates": 2},
    {"layout": "I", "report_error": True},
    {"layout": "I", "step_cache": 2, "guidance_cache": 2},
    {"layout": "I", "negative_prompt": "fog"},
]
PARTS = {
    "language_model.layers.1.mlp.down_proj.weight": WORDS + PICTURES[:1],
    "text_head.base.bias": WORDS,
    "vision.slot_projection.bias": [WORDS[0], *PICTURES[:2]],
    "image_decoder.unet.conv_out.bias": PICTURES,
    "image_decoder.vae.decoder.conv_out.bias": PICTURES,
    "image_decoder.resampler.queries": PICTURES,
}


def broken(part, value):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(part).fill_(value)
    return InterleavedGenerator(model, tiny_processor(model.config))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_number_never_leaves_the_model(part, value):
    generator = broken(part, value)
    for settings in PARTS[part]:
        with pytest.raises(NumericalError, match="are not finite, expected numbers"):
            generator.generate(DOCUMENT, **FAST, **settings)
        failed = [event for _, event in generator.stream_batch([DOCUMENT] * 2, **FAST, **settings)]
        assert [type(event.error) for event in failed if isinstance(event, Failed)] == [NumericalError] * 2
        assert not any(isinstance(event, Finished) for event in failed)
    if WORDS[0] in PARTS[part]:
        for options in (["a"], ["a", "b"], ["", "longer ones"]):
            with pytest.raises(NumericalError, match="the log-probabilities of texts are not finite"):
                generator.score_options(DOCUMENT, options)


def test_previews_are_no_black_pictures_either():
    generator = broken("image_decoder.vae.decoder.conv_out.bias", math.nan)
    with pytest.raises(NumericalError, match="the pixels of a generated image"):
        list(generator.stream(DOCUMENT, layout="I", preview_every=1, **FAST))


def test_pixels_beyond_all_bounds_are_no_white_picture():
    model = tiny_model()
    with pytest.raises(NumericalError, match="pixels"):
        diffusion.decode_images(model.image_decoder, torch.full((1, 4, 8, 8), math.inf))


def test_sampling_that_leaves_the_range_of_numbers_is_refused():
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    with pytest.raises(NumericalError, match="the probabilities of the next token"):
        generator.generate(DOCUMENT, layout="T", do_sample=True, temperature=1e-44, **FAST)


@pytest.mark.parametrize("layout", ["T I", "I T"])
def test_a_document_whose_numbers_are_none_fails_alone(layout):
    model = tiny_model()
    processor = tiny_processor(model.config)
    [word] = processor.vocabulary.encode_text("#")
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = math.nan
    generator = InterleavedGenerator(model, processor)
    documents = [
        Document(id="a", parts=[Text("Hi")]),
        Document(id="bad", parts=[Text("#"), PICTURE]),
        Document(id="c", parts=[Text("A longer one"), PICTURE]),
    ]
    settings = {"layout": layout, **FAST}
    last = {}
    for place, event in generator.stream_batch(documents, **settings):
        last[place] = event
    assert isinstance(last[1], Failed) and isinstance(last[1].error, NumericalError)
    for place in (0, 2):
        alone = generator.generate(documents[place], **settings)
        for ours, theirs in zip(last[place].document.parts, alone.parts, strict=True):
            if isinstance(ours, Text):
                assert ours == theirs
            else:
                one, other = (np.asarray(image.load(), np.int16) for image in (ours, theirs))
                assert np.abs(one - other).max() <= 1
    with pytest.raises(NumericalError):
        generator.generate_batch(documents, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "part",
    ["vision.resampler.layers.0.self_attention.key_norm.weight", "image_decoder.vae.encoder.conv_in.bias"],
)
def test_a_damaged_weight_is_named_when_the_model_is_loaded(part, value, tmp_path):
    """Also where no number shows it: attention on a CPU makes zeros of queries that are none."""
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(part).view(-1)[-1] = value
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match=f"{part} holds numbers that are not finite"):
        load_generator(tmp_path)
