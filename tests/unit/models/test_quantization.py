"""Weights in few bits: which layers, how far off, and a clear refusal where the library is missing."""

import pytest
import torch

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import ModelFileError, UsageError
from mm_interleaved.models.quantization import QUANTIZATIONS, weight_only
from tiny import BOS, tiny_config, tiny_model

MOST_OFF = {"int8": 0.02, "nf4": 0.25}
"""Deviation of logits as a share of their own; random weights are harder than trained ones."""


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_missing_library_is_named_with_what_to_install(kind, monkeypatch):
    monkeypatch.setattr("mm_interleaved.models.quantization.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{kind} needs {QUANTIZATIONS[kind]}.*mm-interleaved\[quantize\]"):
        weight_only(kind)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="expected one of int8, nf4"):
        weight_only("int3")


@pytest.mark.quantize
@pytest.mark.parametrize("kind", MOST_OFF)
@torch.no_grad()
def test_few_bits_change_the_words_little_and_the_rest_not_at_all(kind, tmp_path):
    # bitsandbytes shares a scale among 64 columns.
    text = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny_model(text_config=tiny_config().text_config.to_dict() | text)
    model.save_pretrained(tmp_path)
    small = load_model(tmp_path, quantization_config=weight_only(kind))
    own = {f"language_model.layers.{i}.{name}" for i in (0, 1) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    linear = {name: module for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, each in linear.items() if type(each.weight) is not torch.nn.Parameter} == own

    ids = torch.tensor([[BOS, 5, 298, 299, 299, 299, 7, 8, 9]])
    images = {"pixel_values": torch.rand(1, 3, 32, 32), "image_start": torch.tensor([[2]])}
    exact, found = model(ids, **images), small(ids, **images)
    off = ((found.logits - exact.logits).std() / exact.logits.std()).item()
    assert 0 < off < MOST_OFF[kind]
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [298, 299]}
    plain = small.generate(ids, pixel_values=images["pixel_values"], **options)
    static = small.generate(
        ids, pixel_values=images["pixel_values"], cache_implementation="static", **options
    )
    assert torch.equal(plain, static)


@pytest.mark.quantize
@pytest.mark.parametrize("kind", MOST_OFF)
def test_weights_in_few_bits_are_not_saved(kind, tmp_path):
    text = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
    tiny_model(text_config=tiny_config().text_config.to_dict() | text).save_pretrained(tmp_path / "whole")
    small = load_model(tmp_path / "whole", quantization_config=weight_only(kind))
    for save in (small.save_pretrained, lambda folder: small.save_pretrained(folder, push_to_hub=True)):
        with pytest.raises(ModelFileError, match=f"in few bits by {QUANTIZATIONS[kind]}"):
            save(tmp_path / "small")
    with pytest.raises(ModelFileError, match="would not come back"):
        small.push_to_hub("pip/small", api=None)
    assert not (tmp_path / "small").exists()
