"""Settings say what is wrong with a value, and who outranks whom."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import replace

import pytest

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.generation import schedulers, settings
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.models import config


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"top_p": 1.5}, "top_p: found 1.5, expected 0 to 1"),
        ({"temperature": 0}, "temperature: found 0, expected more than 0"),
        ({"seed": True}, "seed: found True, expected int"),
        ({"seed": -1}, "seed: found -1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: found nan, expected float"),
        ({"height": "64"}, "height: found '64', expected int or null"),
        ({"layout": "T X"}, "layout: found 'X' as part 2, expected"),
        ({"layout": " "}, "layout: found no part, expected"),
        ({"scheduler": "dimm"}, "did you mean 'ddim'"),
        ({"scheduler": "dpm++"}, "did you mean 'dpm-solver++'"),
        ({"num_steps": 3}, "did you mean 'num_inference_steps'"),
        ({"steps": 3}, "did you mean 'num_inference_steps'"),
        ({"context_images": [0, "1"]}, "context_images: found [0, '1'], expected str or null"),
        ({"context_images": []}, "context_images: found [], expected str or null"),
        ({"context_images": [-1]}, "context_images: found '-1'"),
        ({"context_images": True}, "context_images: found True"),
        ({"num_inference_step": 3}, "unknown generation setting 'num_inference_step': did you mean"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: found 2, expected 1 together with do_sample"),
        ({"context_images": "first"}, "context_images: found 'first'"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens: found 9, expected at most"),
    ],
)
def test_impossible_values_are_named(wrong, sentence):
    with pytest.raises(UsageError) as caught:
        GenerationSettings.combine(wrong)
    assert sentence in str(caught.value)
    assert caught.value.field in wrong


def test_whole_numbers_are_welcome_where_fractions_are_meant():
    assert GenerationSettings.combine({"guidance_scale": 3}).guidance_scale == 3


def test_settings_survive_json():
    settings = GenerationSettings(layout="T I", context_images="0,2", seed=2**40)
    assert GenerationSettings.combine(json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.context_image_indices() == (0, 2)
    assert GenerationSettings(context_images="all").context_image_indices() is None


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0], "0"), ((0, 2), "0,2"), (1, "1"), ("0, 2", "0, 2"), ("all", "all"), (None, None)],
)
def test_context_images_may_be_a_list_of_indices(indices, text):
    assert GenerationSettings(context_images=indices).context_images == text
    document = Document(id="a", parts=(Text("x"),), generation={"context_images": indices})
    assert settings_for(document, {}, {}).context_images == text


# ---- What is not given is the document's own, then the model's ----

MODEL = {"num_inference_steps": 8, "scheduler": "unipc", "guidance_scale": 3.0, "max_new_tokens": 500}


def test_only_what_is_given_counts():
    given = GenerationSettings(seed=3, layout="it")
    assert given.given() == {"seed": 3, "layout": "I T"} and not given.is_complete
    assert GenerationSettings().given() == {}
    # What is given stays given where it is as it would be by default.
    assert GenerationSettings(num_inference_steps=30).given() == {"num_inference_steps": 30}


def test_copies_know_what_was_given():
    given = GenerationSettings(seed=3, layout="it")
    for copied in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert copied == given and copied.given() == given.given()
    assert replace(given, top_p=0.5).given() == {**given.given(), "top_p": 0.5}
    complete = GenerationSettings.combine({"seed": 1})
    assert complete.is_complete and copy.deepcopy(complete).is_complete
    assert complete.given() == complete.to_dict()


@pytest.mark.parametrize("given", [{}, {"seed": 3}, {"num_inference_steps": 30}, {"layout": "I"}])
def test_the_rest_is_the_documents_then_the_models(given):
    document = Document(id="a", parts=(Text("x"),), layout="T I", generation={"guidance_scale": 5.0})
    settings = settings_for(document, MODEL, GenerationSettings(**given).given())
    expected = {**MODEL, "guidance_scale": 5.0, "layout": "T I", **given}
    expected.pop("seed", None)  # each document draws its own from it
    assert expected.items() <= settings.to_dict().items()


def test_what_the_model_allows_is_not_refused_by_general_limits():
    document = Document(id="a", parts=(Text("x"),))
    given = GenerationSettings(min_new_tokens=300)  # more than the general max_new_tokens
    assert settings_for(document, MODEL, given.given()).min_new_tokens == 300
    with pytest.raises(UsageError, match="expected at most max_new_tokens = 256"):
        settings_for(document, {}, given.given())


def test_flags_outrank_documents_and_documents_outrank_models():
    document = Document(id="a", parts=(Text("x"),), generation={"num_inference_steps": 5, "top_p": 0.5})
    settings = settings_for(document, {"num_inference_steps": 9, "num_candidates": 3}, {"top_p": 0.25})
    assert (settings.num_inference_steps, settings.num_candidates, settings.top_p) == (5, 3, 0.25)


def test_layout_of_a_document_counts_as_its_own_argument():
    document = Document(id="a", parts=(Text("x"),), layout="T I")
    assert settings_for(document, {}, {}).layout == "T I"
    assert settings_for(document, {}, {"layout": "I"}).layout == "I"


def test_documents_draw_different_seeds_from_one_run_seed():
    seeds = {
        settings_for(Document(id=name, parts=(Text("x"),)), {}, {"seed": run}).seed
        for name in "abc"
        for run in range(3)
    }
    assert len(seeds) == 9


def test_own_seed_of_a_document_is_taken_as_it_is():
    document = Document(id="a", parts=(Text("x"),), generation={"seed": 11})
    assert settings_for(document, {}, {}).seed == 11
    assert settings_for(document, {}, {"seed": 1}).seed != 11


def test_wrong_argument_of_a_document_is_an_error_of_the_input():
    with pytest.raises(InputError, match=r"document 'a': generation\.top_p: found 2"):
        settings_for(Document(id="a", parts=(Text("x"),), generation={"top_p": 2}), {}, {})


@pytest.mark.parametrize(
    ("own", "layout", "field", "sentence"),
    [
        ({"top_p": 2}, None, "generation.top_p", "generation.top_p: found 2"),
        ({"top_q": 1}, None, "generation.top_q", "generation: unknown generation setting 'top_q'"),
        ({"layout": "X"}, None, "generation.layout", "generation.layout: found 'X'"),
        ({"max_new_tokens": 1}, "T T", "layout", "layout: found 'T T'"),
        # What is impossible came from the model's default, what made it so from the document.
        ({"max_new_tokens": 1}, None, "generation", "generation: min_new_tokens: found 4"),
    ],
)
def test_wrong_argument_of_a_document_is_named_where_it_stands(own, layout, field, sentence):
    document = Document(id="a", parts=(Text("x"),), layout=layout, generation=own)
    defaults = {} if layout else {"min_new_tokens": 4}
    with pytest.raises(InputError) as caught:
        settings_for(document, defaults, {})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"document 'a': {sentence}")


def test_rules_of_the_settings_are_those_of_the_configuration():
    # Written twice, because the settings make the flags of a help that must not load transformers.
    assert settings.CONTEXT_RULES == config.CONTEXT_RULES
    assert tuple(schedulers.SCHEDULERS) == settings.SCHEDULERS


# Of a document, an image or its denoising loop by itself: what text parts written together do is the same.
NOT_OF_A_TEXT = {
    "layout", "max_images", "max_new_tokens", "min_new_tokens", "report_error", "height", "width",
    "negative_prompt", "num_candidates", "context_images", "seed", "scheduler", "num_inference_steps",
    "guidance_scale", "context_strength", "step_cache", "guidance_cache",
}  # fmt: skip


def test_every_setting_is_of_a_text_or_not():
    """A setting in neither would let one document's tokens be chosen by another's value."""
    from mm_interleaved.generation.text import TEXT_SETTINGS

    names = {field.name for field in dataclasses.fields(GenerationSettings)}
    assert {*TEXT_SETTINGS} | NOT_OF_A_TEXT == names
    assert not {*TEXT_SETTINGS} & NOT_OF_A_TEXT


def test_a_pass_of_the_unet_is_given_nothing_that_its_images_need_not_share():
    """One more value of a loop must be joined in `ImageBatch`, or made part of its `pass_key`."""
    from mm_interleaved.generation.diffusion import UNetInput

    names = {field.name for field in dataclasses.fields(UNetInput)}
    assert names == {"latents", "timestep", "reading", "context_strength", "deep"}
