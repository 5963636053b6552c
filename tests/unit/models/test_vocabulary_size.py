"""`resize_token_embeddings`: a longer or shorter vocabulary, or nothing at all is changed."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from tiny import BOS, image_ids, tiny_model

SIZE = 300


def logits(model):
    ids = torch.tensor([[BOS, 5, *image_ids(model.config), 9]])
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def tied(model):
    model.text_head.base.weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "asked, size",
    [
        ({"new_num_tokens": 308}, 308),
        ({"pad_to_multiple_of": 64}, 320),
        ({"new_num_tokens": 305, "pad_to_multiple_of": 8}, 312),
    ],
)
def test_a_longer_vocabulary_keeps_all_that_the_model_knew(tmp_path, asked, size, is_tied, mean_resizing):
    model = tied(tiny_model()) if is_tied else tiny_model()
    model.text_head.new.requires_grad_(False)
    before = logits(model)
    embeddings = model.resize_token_embeddings(**asked, mean_resizing=mean_resizing)
    assert embeddings is model.get_input_embeddings() and embeddings.num_embeddings == size
    after = logits(model)
    assert after.shape[-1] == size
    # A longer matrix may be multiplied in another order.
    torch.testing.assert_close(after[..., :SIZE], before, rtol=0, atol=1e-5)
    # Nothing is said that was never learned.
    if not is_tied:
        assert (after[..., SIZE:] == -5).all()
    assert (model.text_head.base.weight is embeddings.weight) == is_tied
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == size
    assert not any(parameter.requires_grad for parameter in model.text_head.new.parameters())
    assert model.generate(torch.tensor([[BOS, 5]]), max_new_tokens=2).shape == (1, 4)
    if not is_tied:
        model.save_pretrained(tmp_path)
        again = MMInterleavedForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-5)


def test_added_tokens_can_be_learned():
    model = tiny_model()
    model.resize_token_embeddings(303)
    ids = torch.tensor([[BOS, 5, 301, 302]])
    model(input_ids=ids, text_target=ids > 300).loss.backward()
    for weight in (model.get_input_embeddings().weight, model.text_head.base.bias):
        assert weight.grad[301].abs().sum() > 0
    assert model.text_head.new.bias.grad[301 - 298] != 0


def test_tokens_that_were_added_can_be_removed():
    model = tiny_model()
    before = logits(model)
    model.resize_token_embeddings(320)
    model.resize_token_embeddings(310)
    assert logits(model).shape[-1] == 310
    model.resize_token_embeddings(SIZE)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert model.config.num_new_tokens == model.text_head.num_new == 2


def test_no_number_changes_nothing():
    model = tiny_model()
    embeddings = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embeddings
    assert model.resize_token_embeddings(SIZE) is embeddings
    assert model.text_head.num_new == 2


def with_adapter(model):
    model.text_head.base = torch.nn.Sequential(model.text_head.base)
    model.text_head.base.out_features = SIZE
    return model


@pytest.mark.parametrize(
    "make, size, message",
    [
        (lambda: tiny_model(), 299, "found 299 tokens, expected at least 300"),
        (lambda: tiny_model(), 1, "found 1 tokens, expected at least 300"),
        (lambda: tied(tiny_model()), 308.0, "found 308.0, expected a whole number"),
        (lambda: tied(tiny_model()), "308", "found '308', expected a whole number"),
        (lambda: cpu_offload(tiny_model(), torch.device("cpu")), 308, "offloaded, sharded, quantised"),
        (lambda: with_adapter(tiny_model()), 308, "or have adapters"),
    ],
    ids=["the last image token", "nearly all", "a fraction", "a word", "offloaded", "adapter"],
)
def test_what_cannot_be_resized_is_refused_and_nothing_is_changed(make, size, message):
    model = make()
    config = copy.deepcopy(model.config.to_dict())
    modules = [model.get_input_embeddings(), model.text_head.base, model.text_head.new]
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(size)
    assert modules == [model.get_input_embeddings(), model.text_head.base, model.text_head.new]
    assert model.config.to_dict() == config
