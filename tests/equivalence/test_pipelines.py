"""The model through transformers' Auto classes and pipelines."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    pipeline,
)
from transformers.utils import import_utils

from mm_interleaved import register
from tiny import tiny_model, tiny_processor

QUIET = {"max_new_tokens": 5, "eos_token_id": None}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What </s>?"}]}]


def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def wordy_model():
    """A model that says neither image tokens nor padding, as any trained one."""
    model = tiny_model()
    with torch.no_grad():
        model.text_head.base.bias[[2, 298, 299]] = -100
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    register()
    folder = tmp_path_factory.mktemp("pipelines")
    model = wordy_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected():
    """The answer to one question about one picture, by hand."""
    model = wordy_model()
    processor = tiny_processor(model.config)
    inputs = processor.apply_chat_template(
        MESSAGES,
        images=[picture()],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, **QUIET)
    return processor.decode(ids[0, -5:], skip_special_tokens=True)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText])
def test_auto_classes_load_the_model(folder, auto):
    model = auto.from_pretrained(folder)
    assert type(model).__name__ == "MMInterleavedForConditionalGeneration"
    assert torch.equal(model.image_start_embedding, tiny_model().image_start_embedding)


def test_the_examples_of_the_page_run(folder, capsys):
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    names = {"folder": folder, "image": picture()}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert "generated_text" in capsys.readouterr().out


def answers(pipe):
    """What a pipeline says of a conversation, of two at once, of a text with an image, of texts alone."""
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, MESSAGES[0]["content"][1]]}
    ]
    chat = {"text": messages, "return_full_text": False}
    [one] = pipe(**chat, generate_kwargs=QUIET)
    two = pipe(text=[messages, messages], return_full_text=False, generate_kwargs=QUIET)
    [beside] = pipe(images=picture(), text="What?<|image|>", return_full_text=False, generate_kwargs=QUIET)
    [alone] = pipe(text="What?", return_full_text=False, generate_kwargs=QUIET)
    said = [one, *(answer for [answer] in two)]
    return [answer["generated_text"] for answer in said], beside["generated_text"], alone["generated_text"]


def test_image_text_to_text_answers_as_the_model_does(folder, expected):
    said, beside, alone = answers(pipeline("image-text-to-text", model=folder))
    assert said == [expected] * 3
    assert beside and alone and beside != alone


def test_any_to_any_answers_as_the_model_does_where_its_library_runs(folder, expected, monkeypatch):
    # The pipeline asks for torchvision wherever a model sees images; this processor does without.
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "torchvision", (lambda: True, ""))
    said, beside, alone = answers(pipeline("any-to-any", model=folder))
    assert said == [expected] * 3
    assert beside and alone and beside != alone
