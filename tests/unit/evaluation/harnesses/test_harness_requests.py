"""What a harness asks becomes a document with a hole, what it says of generation becomes settings, and an
answer the string that it reads. No harness is needed.
"""

import json
import logging

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.errors import ImageError, InputError, UsageError
from mm_interleaved.evaluation.harnesses.answers import cut_at, file_name, text_and_images, text_of
from mm_interleaved.evaluation.harnesses.documents import (
    document_of_context,
    document_of_items,
    document_of_messages,
)
from mm_interleaved.evaluation.harnesses.harness_model import AUTO_BATCH_SIZE, HarnessModel
from mm_interleaved.evaluation.harnesses.settings import (
    generation_settings,
    layout_of_task,
    stop_texts,
    wants_images,
)
from mm_interleaved.generation.settings import GenerationSettings

RED, BLUE = PILImage.new("RGB", (4, 4), (200, 0, 0)), PILImage.new("RGB", (4, 4), (0, 0, 200))


def kinds(document):
    return "".join("T" if isinstance(part, Text) else "I" for part in document.parts)


def of_context(context, visuals, **changes):
    return document_of_context(context, visuals, "task t, document 3", **{"is_conversation": True, **changes})


# ---- Documents -----------------------------------------------------------------------------------


def test_images_stand_before_the_context_or_where_its_placeholders_say():
    assert kinds(of_context("What is it?", [RED, BLUE])) == "IIT"
    placed = of_context("<image 1> and <image 2>: which?", [RED, BLUE])
    assert kinds(placed) == "ITIT" and "<" not in placed.text
    assert kinds(of_context("Compare <image> with <image>.", [RED, BLUE])) == "TITIT"


@pytest.mark.parametrize("visuals", [None, [], [RED], RED])
def test_placeholders_that_do_not_match_the_images_are_text(visuals):
    context = "What do <image> and <image> mean, </s> <|image_pad|> [INST]?"
    document = of_context(context, visuals)
    assert document.text == context and len(document.images) == (visuals is not None and visuals != [])


def test_in_messages_and_items_text_is_text_and_order_is_kept():
    spelt = "<image> <s> <|im_start|>"
    content = [{"type": "image", "url": RED}, {"type": "text", "text": spelt}, {"type": "image", "url": BLUE}]
    document = document_of_messages([{"role": "user", "content": content}], "k", is_conversation=False)
    assert kinds(document) == "ITI" and document.text == spelt
    assert [part.source for part in document.images] == [RED, BLUE]
    items = [{"type": "text", "value": spelt}, {"type": "image", "value": "a b.png"}]
    document = document_of_items(items, "k", is_conversation=True)
    assert kinds(document) == "TI" and document.text == spelt and str(document.images[0].source) == "a b.png"


def test_a_conversation_has_roles_and_several_speakers_are_one_in_any_case():
    assert {part.role for part in of_context("Hi", RED).parts} == {"user"}
    assert {part.role for part in of_context("Hi", RED, is_conversation=False).parts} == {None}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "Again"}, {"type": "text", "text": ""}]},
    ]
    document = document_of_messages(messages, "k", is_conversation=False)
    assert [part.role for part in document.parts] == ["user", "assistant", "user"]


@pytest.mark.parametrize("visual", [RED, {"bytes": b"x", "path": None}, {"type": "image", "url": RED}, b"x"])
def test_images_come_in_every_form_that_data_sets_have(visual):
    assert kinds(of_context("", visual)) == "I"


@pytest.mark.parametrize(
    ("visual", "error", "found"),
    [
        ({"type": "video", "url": "a"}, InputError, "'video'"),
        ({"type": "audio", "url": {"array": []}}, InputError, "'audio'"),
        ("clip.mp4", InputError, "'video'"),
        ("sound.WAV", InputError, "'audio'"),
        (7, InputError, "found int"),
        ("https://host/a.png", ImageError, "never fetched"),
    ],
)
def test_what_is_no_image_is_refused_by_name(visual, error, found):
    with pytest.raises(error, match=rf"^task t, document 3: .*{found}"):
        of_context("Hi", [visual])


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({}, False),
        ({"temperature": 0, "top_p": 0, "do_sample": False}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": None, "do_sample": True, "top_p": 0.9}, True),
        ({"temperature": 1.0, "top_p": 0}, False),
    ],
)
def test_sampling_is_what_harnesses_mean_by_it(given, sampled):
    settings = generation_settings(given)
    assert settings["do_sample"] == sampled
    assert sampled or not {"temperature", "top_p", "top_k"} & settings.keys()
    GenerationSettings.combine(settings)


def test_our_own_settings_pass_and_others_are_named_once(caplog):
    given = {"max_new_tokens": 16, "num_beams": 2, "layout": "T I", "num_inference_steps": 4, "top_p": None}
    others = {"until": ["\n"], "image_aspect_ratio_": "original"}
    with caplog.at_level(logging.WARNING):
        settings = generation_settings(given | others)
        generation_settings(given | others)
    assert settings == {**{k: v for k, v in given.items() if v is not None}, "do_sample": False}
    assert [record.getMessage().split()[0] for record in caplog.records] == ["image_aspect_ratio_"]


def test_stop_texts_are_one_or_several_or_none():
    assert stop_texts({"until": "\n\n"}) == ("\n\n",)
    assert stop_texts({"until": ["a", "", None]}) == ("a",)
    assert stop_texts({"until": None}) == stop_texts({}) == ()


def test_the_layout_of_a_task_says_what_its_answers_look_like():
    assert layout_of_task("pope") == layout_of_task("uevaluate") == "T"
    assert layout_of_task("ueval") == layout_of_task("uni_mmmu_jigsaw") == "auto"
    assert layout_of_task("gedit_bench") == "I"
    assert [wants_images(layout) for layout in ("T", "T T", "I", "t i", "auto")] == [0, 0, 1, 1, 1]


def test_settings_of_a_model_are_checked_before_it_is_loaded(tmp_path):
    for settings, message in (({"max_tokens": 4}, "max_tokens"), ({"layout": "X"}, "layout")):
        with pytest.raises(UsageError, match=message):
            HarnessModel("storyworld", images=tmp_path, settings=settings)
    with pytest.raises(UsageError, match="batch_size: found 'many', expected a number from 1, or auto"):
        HarnessModel("storyworld", images=tmp_path, batch_size="many", settings={})
    for given, size in (("auto:4", AUTO_BATCH_SIZE), ("3", 3), (5, 5)):
        assert HarnessModel("x", images=tmp_path, batch_size=given, settings={}).batch_size == size


def test_what_is_asked_is_a_conversation_where_text_is_wanted_unless_it_is_said(tmp_path):
    model = HarnessModel("x", images=tmp_path, settings={})
    assert model.is_conversation("T") and not model.is_conversation("T I")
    model = HarnessModel("x", images=tmp_path, conversation=False, settings={})
    assert not model.is_conversation("T")


# ---- Answers -------------------------------------------------------------------------------------


def test_an_answer_ends_before_its_first_stop_text_wherever_that_is():
    parts = (Text("one"), Image(RED), Text("two STOP three END"), Image(BLUE))
    assert cut_at(parts, ("END", "STOP")) == (*parts[:2], Text("two "))
    assert cut_at(parts, ("absent",)) == cut_at(parts, ()) == parts


def test_an_answer_with_images_is_json_with_their_paths(tmp_path):
    parts = (Text(" First. "), Image(RED), Text('Quote " <image> ä'), Image(BLUE))
    said = json.loads(text_and_images(parts, tmp_path / "new", "7/../8"))
    assert said["text"] == text_of(parts) == 'First.\nQuote " <image> ä'
    assert [PILImage.open(path).getpixel((0, 0)) for path in said["images"]] == [(200, 0, 0), (0, 0, 200)]
    assert all(path.startswith(str(tmp_path / "new")) for path in said["images"])
    assert json.loads(text_and_images((Text("a"),), tmp_path, "k")) == {"text": "a", "images": []}


def test_other_answers_to_the_same_question_do_not_overwrite_its_images(tmp_path):
    first = text_and_images((Image(RED),), tmp_path, "k")
    second = text_and_images((Image(BLUE),), tmp_path, "k")
    assert first != second and first == text_and_images((Image(RED),), tmp_path, "k")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("key", ["", "..", "../x", "a/b", "a" * 500, "\0"])
def test_a_key_is_a_file_name_of_its_folder(key):
    name = file_name(key)
    assert name and "/" not in name and "\0" not in name and not name.startswith(".") and len(name) <= 120
