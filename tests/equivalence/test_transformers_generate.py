"""transformers' `generate` on the model itself, as its users know it, with images in the prompt."""

import pytest
import torch
from test_model import batch_of, pixels, row

from mm_interleaved.models.transformers_versions import PENALTY_SPARES_PADDING
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompt(model):
    batch = batch_of(
        model.config, [row(model.config, [5, 6], "I", [7, 8]), row(model.config, [9, 4], "I", [3, 4])]
    )
    return {"input_ids": batch["input_ids"], "pixel_values": pixels(2).float()}


def by_hand(model, prompt, steps):
    """Greedy, everything recomputed for every word."""
    ids = prompt["input_ids"]
    starts = (ids == model.config.image_start_token_id).nonzero()[:, 1:]
    for _ in range(steps):
        logits = model(input_ids=ids, pixel_values=prompt["pixel_values"], image_start=starts).logits
        logits[..., -2:] = -torch.inf
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
def test_greedy_with_cache_equals_a_loop_without(model, prompt):
    options = {"suppress_tokens": [298, 299], "eos_token_id": None, "do_sample": False}
    ids = model.generate(**prompt, max_new_tokens=6, **options)
    assert torch.equal(ids, by_hand(model, prompt, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_beams_and_samples_equal_those_without_cache_reuse(model, prompt, options):
    arguments = {"max_new_tokens": 5, "suppress_tokens": [298, 299], "eos_token_id": None, **options}
    torch.manual_seed(3)
    together = model.generate(**prompt, **arguments)
    expected_rows = 2 * options.get("num_return_sequences", 1)
    assert together.shape == (expected_rows, 9 + 5)
    if "do_sample" not in options:
        alone = [
            model.generate(
                prompt["input_ids"][i : i + 1], pixel_values=prompt["pixel_values"][i : i + 1], **arguments
            )
            for i in range(2)
        ]
        assert torch.equal(together, torch.cat(alone))


def test_images_of_the_prompt_matter_while_decoding(model, prompt):
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    other = dict(prompt, pixel_values=pixels(2, seed=5).float())
    assert not torch.equal(model.generate(**prompt, **options), model.generate(**other, **options))


def test_a_misspelt_argument_is_refused(model, prompt):
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate(**prompt, max_new_token=3)


@torch.no_grad()
def test_a_repetition_penalty_spares_padding_where_the_library_does(model, prompt):
    """Padded with the id that the row would say next: once that is penalised, it says another."""
    options = {"suppress_tokens": [298, 299], "eos_token_id": None, "do_sample": False, "max_new_tokens": 1}
    row = {"input_ids": prompt["input_ids"][:1], "pixel_values": prompt["pixel_values"][:1]}
    favourite = model.generate(**row, **options)[:, -1:]
    assert favourite.item() not in row["input_ids"]
    padded = torch.cat([favourite.expand(1, 3), row["input_ids"]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    named = {"attention_mask": mask, "repetition_penalty": 1e4, **options}
    found = model.generate(padded, pixel_values=row["pixel_values"], **named)[:, -1:]
    assert bool(found == favourite) is PENALTY_SPARES_PADDING
