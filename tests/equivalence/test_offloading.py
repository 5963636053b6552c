"""Weights that accelerate keeps elsewhere: the same texts and pictures as with all weights at hand."""

import accelerate
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging.version import Version
from PIL import Image as PILImage

from mm_interleaved import Document, Image, InterleavedGenerator, Text
from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import ModelFileError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.offloading import value_of
from tiny import BOS, image_ids, tiny_config, tiny_model, tiny_processor

CPU = torch.device("cpu")
BY_PART = {
    "vision": "disk", "language_model": "cpu", "text_head": "disk", "image_start_embedding": "cpu",
    "context_projection": "disk", "image_decoder": "disk",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offloading") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def loaded(saved, tmp_path, **placing):
    return load_model(saved, offload_folder=str(tmp_path / "weights"), **placing)


WAYS = {
    "cpu_offload": lambda saved, tmp: cpu_offload(tiny_model(), CPU),
    "cpu_offload, buffers too": lambda saved, tmp: cpu_offload(tiny_model(), CPU, offload_buffers=True),
    "disk_offload, buffers too": lambda saved, tmp: disk_offload(
        tiny_model(), str(tmp / "weights"), CPU, offload_buffers=True
    ),
    "dispatch_model": lambda saved, tmp: dispatch_model(
        tiny_model(), BY_PART, main_device="cpu", offload_dir=str(tmp / "weights"), offload_buffers=True
    ),
    "all on disk": lambda saved, tmp: loaded(saved, tmp, device_map={"": "disk"}),
    "auto, a tenth": lambda saved, tmp: loaded(saved, tmp, device_map="auto", max_memory={"cpu": 100_000}),
    "auto, a half": lambda saved, tmp: loaded(saved, tmp, device_map="auto", max_memory={"cpu": 300_000}),
}
# Which accelerate refused before 1.15, of stock models too.
ALL_ON_DISK = ("all on disk", "auto, a tenth")


def everything(model):
    """Logits, both losses, words, and a document with words and pictures."""
    config = model.config
    ids = torch.tensor([[BOS, 5, 6, *image_ids(config), 9, *image_ids(config), 7]])
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(1)
        output = model(input_ids=ids, pixel_values=pixels, target_pixel_values=pixels, text_target=ids < 298)
        without = model(input_ids=ids[:, :3]).logits
    words = model.generate(ids, pixel_values=pixels, max_new_tokens=2, suppress_tokens=[298, 299])
    picture = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    document = Document(id="d", parts=[Text("hello"), Image(picture)])
    generator = InterleavedGenerator(model, tiny_processor(config))
    made = generator.generate(document, layout="T I", max_new_tokens=2, num_inference_steps=2)
    pictures = torch.stack([torch.from_numpy(np.array(part.load())) for part in made.parts[-1:]])
    numbers = (output.logits, output.text_loss, output.image_loss, without, pictures.float())
    return numbers, (words.tolist(), made.parts[2].text)


@pytest.fixture(scope="module")
def expected():
    return everything(tiny_model())


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_compute_what_weights_at_hand_do(way, saved, tmp_path, expected):
    if way in ALL_ON_DISK and Version(accelerate.__version__) < Version("1.15"):
        with pytest.raises(ModelFileError, match="use the `disk_offload` function instead"):
            WAYS[way](saved, tmp_path)
        return
    model = WAYS[way](saved, tmp_path)
    assert model.device == CPU
    numbers, texts = everything(model)
    assert texts == expected[1]
    for found, right in zip(numbers[:-1], expected[0][:-1], strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    # Folding rounds otherwise: a level of 255, here and there.
    assert (numbers[-1] - expected[0][-1]).abs().max() <= 1


def test_a_weight_that_nothing_brings_is_named():
    with torch.device("meta"):
        model = MMInterleavedForConditionalGeneration(tiny_config())
    assert value_of(model, "image_start_embedding") is model.image_start_embedding
    model.text_head.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"image_start_embedding .* is on the meta device"):
        value_of(model, "image_start_embedding")


def test_a_weight_at_hand_is_itself_and_gets_its_gradient():
    model = tiny_model()
    assert value_of(model, "image_start_embedding") is model.image_start_embedding
    model.embed(torch.tensor([[BOS, 298]])).sum().backward()
    assert model.image_start_embedding.grad is not None and model.image_start_embedding.grad.all()
