"""transformers' `generate` on the model itself, as its users know it, with images in the prompt."""

import pytest
import torch
import transformers
from test_model import batch_of, pixels, row

from tiny import tiny_model, tiny_processor


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
    # Since 5.23 the penalty leaves left padding alone; before, its ids counted as tokens of the prompt.
    spares_padding = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    assert bool(found == favourite) is spares_padding


def test_stop_strings_end_the_text_where_they_stand(model):
    tokenizer = tiny_processor(model.config).tokenizer
    prompt = torch.tensor([[0, 5, 6, 7]])
    options = {"max_new_tokens": 24, "eos_token_id": None, "suppress_tokens": [298, 299], "do_sample": True}
    torch.manual_seed(2)
    whole = model.generate(prompt, **options)
    words = [tokenizer.decode(whole[0, i : i + 1]) for i in range(4, 28)]
    stop = next(word for word in words[8:] if word.isascii() and word.isprintable())
    torch.manual_seed(2)
    stopped = model.generate(prompt, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped, whole[:, : 4 + words.index(stop) + 1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_hidden_states_and_attentions_come_as_stock_models_return_them(options):
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model.generate(
        torch.tensor([[0, 5, 6, 7]]),
        max_new_tokens=3,
        min_new_tokens=3,
        output_hidden_states=True,
        output_attentions=True,
        return_dict_in_generate=True,
        **options,
    )
    assert len(output.hidden_states) == len(output.attentions) == 3
    layers = model.config.text_config.num_hidden_layers
    for step, (hidden, attention) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        assert len(hidden) == layers + 1 and len(attention) == layers
        assert hidden[0].shape[1] == attention[0].shape[2] == (4 if step == 0 else 1)


@torch.no_grad()
def test_forward_returns_hidden_states_attentions_and_tuples():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[0, 5, 6, 7]])
    plain = model(input_ids=ids)
    assert plain.hidden_states is None and plain.attentions is None
    output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.hidden_states[-1], output.hidden)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 4, 4))
    found = model(input_ids=ids, output_hidden_states=True, return_dict=False, use_cache=True)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], plain.logits) and torch.equal(found[1], plain.hidden)
    model.config.output_hidden_states, model.config.return_dict = True, False
    logits, _, hidden_states = model(input_ids=ids)
    assert torch.equal(logits, plain.logits) and len(hidden_states) == 4
