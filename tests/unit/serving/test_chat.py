"""Chat completions: three formats of one answer, streams that say the same, answers that may be sent back."""

from __future__ import annotations

from unittest.mock import ANY

import httpx2
import pytest

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.serving.answers import joined
from serving_requests import chat, chunks, data_url, error, opened

FORMATS = ("images", "parts", "markdown")


def message_of(response):
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["message"]


def shown(parts):
    """Texts, and images by their size and colour."""
    return [
        each.text if isinstance(each, Text) else (each.load().size, each.load().getpixel((0, 0)))
        for each in parts
    ]


def test_images_stand_beside_the_text_with_their_place_in_it(client):
    message = message_of(chat(client, "a cat", seed=3))
    assert message["content"] == "0: a cat\n\n2: a cat"
    [image] = message["images"]
    assert opened(image["image_url"]["url"]).size == (16, 16)
    assert (image["index"], image["text_offset"]) == (0, len("0: a cat"))


def test_parts_are_one_list_in_order(client):
    content = message_of(chat(client, "a cat", answer_format="parts"))["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text"]
    assert [part["index"] for part in content] == [0, 1, 2]
    assert content[2]["text"] == "2: a cat"


def test_markdown_points_at_files_of_the_server(client, served):
    content = message_of(chat(client, "a cat", model="storyworld:markdown"))["content"]
    before, rest = content.split("![image 1](")
    address, after = rest.split(")")
    assert (before, after) == ("0: a cat\n\n", "\n\n2: a cat")
    assert address.startswith(f"{served.url}/files/") and len(address) < 100
    found = httpx2.get(address)
    assert found.headers["content-type"] == "image/png" and found.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("answer_format", FORMATS)
@pytest.mark.parametrize("layout", ["T I T", "I", "I T I I T", "T"])
def test_a_stream_joined_is_the_whole_answer(client, answer_format, layout):
    asked = {"layout": layout, "seed": 5, "answer_format": answer_format}
    whole = message_of(chat(client, "a cat", **asked))
    *found, done = chunks(chat(client, "a cat", stream=True, **asked))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
    assert reasons == [None] * (len(found) - 1) + ["stop"]
    streamed = joined(deltas, answer_format)
    if answer_format == "markdown":
        # Each answer has files of its own.
        assert [line[:9] for line in streamed["content"].splitlines()] == [
            line[:9] for line in whole["content"].splitlines()
        ]
    else:
        assert streamed == {key: whole[key] for key in streamed}


@pytest.mark.parametrize("answer_format", FORMATS)
def test_an_answer_sent_back_is_read_as_the_parts_that_it_was(client, engine, answer_format):
    asked = {"layout": "T I T I", "seed": 5, "answer_format": answer_format}
    answer = message_of(chat(client, "a cat", **asked))
    first = [{"role": "user", "content": "a cat"}, answer, {"role": "user", "content": "and now?"}]
    assert chat(client, messages=first, answer_format=answer_format).status_code == 200
    document = engine.documents[-1]
    assert [part.role for part in document.parts] == ["user", *["assistant"] * 4, "user"]
    kinds = [type(part) for part in document.parts]
    assert kinds == [Text, Text, Image, Text, Image, Text]
    assert [part.text for part in document.parts if isinstance(part, Text)] == [
        "a cat", "0: a cat", "2: a cat", "and now?",
    ]  # fmt: skip
    assert all(image.load().size == (16, 16) for image in document.images)


def test_content_parts_keep_their_order_and_their_pixels(client, engine):
    content = [
        {"type": "text", "text": "this"},
        {"type": "image_url", "image_url": {"url": data_url((3, 2), (1, 2, 3)), "detail": "low"}},
        {"type": "text", "text": "and this"},
        {"type": "image_url", "image_url": {"url": data_url((5, 4), (4, 5, 6))}},
    ]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]
    assert chat(client, messages=messages).status_code == 200
    [document] = engine.documents
    assert shown(document.parts) == ["be kind", "this", ((3, 2), (1, 2, 3)), "and this", ((5, 4), (4, 5, 6))]
    assert [part.role for part in document.parts] == ["system", *["user"] * 4]


def test_a_stream_tells_usage_once_where_it_is_asked_for(client):
    whole = chat(client, "a cat").json()["usage"]
    *_, usage, done = chunks(chat(client, "a cat", stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole
    assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"] > 0
    assert not any(chunk.get("usage") for chunk in chunks(chat(client, "a", stream=True))[:-1])


@pytest.mark.parametrize("steps", [4, 12, 13])
def test_previews_come_before_their_image_and_only_where_asked_for(client, steps):
    asked = {"layout": "T I", "stream": True, "num_inference_steps": steps}
    *found, _ = chunks(chat(client, "a cat", partial_images=2, **asked))
    images = [image for chunk in found for image in chunk["choices"][0]["delta"].get("images", ())]
    assert [image.get("preview", False) for image in images] == [True, True, False]
    assert {image["index"] for image in images} == {0} and {image["text_offset"] for image in images} == {8}
    assert [chunk.get("modality") for chunk in found if "images" in chunk["choices"][0]["delta"]] == [
        "image"
    ] * 3
    *found, _ = chunks(chat(client, "a cat", **asked))
    assert sum(len(chunk["choices"][0]["delta"].get("images", ())) for chunk in found) == 1


def test_modalities_say_what_is_wanted(client, engine):
    assert message_of(chat(client, "a cat", modalities=["text"]))["images"] == []
    assert message_of(chat(client, "a cat", modalities=["image"]))["content"] == ""
    assert len(message_of(chat(client, "a cat", modalities=["image", "text"]))["images"]) == 1
    # One image of a text is a document of its own, not a turn of a conversation.
    assert [part.role for document in engine.documents for part in document.parts] == ["user", None, "user"]
    chat(client, "a cat", modalities=["image"], as_document=False)
    assert engine.documents[-1].parts[0].role == "user"


def test_settings_arrive_under_the_names_in_use(client, engine):
    text = {"max_tokens": 20, "temperature": 0.5, "top_k": 7, "layout": "T I", "seed": 9}
    images = {"num_inference_steps": 7, "true_cfg_scale": 2.5, "negative_prompt": "rain", "size": "24x32"}
    more = {"context_images": [0, 2], "num_candidates": 2, "scheduler": "ddim"}
    assert chat(client, **text, **images, **more).status_code == 200
    [settings] = engine.settings
    assert (settings.max_new_tokens, settings.num_inference_steps, settings.guidance_scale) == (20, 7, 2.5)
    assert (settings.width, settings.height, settings.seed) == (24, 32, 9)
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.5, 7)
    assert (settings.negative_prompt, settings.context_images, settings.scheduler) == ("rain", "0,2", "ddim")


@pytest.mark.parametrize(
    ("asked", "samples"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"top_p": 0.9}, True),
        ({"temperature": 0, "top_p": 0.9}, False),
    ],
)
def test_sampling_is_asked_for_by_a_temperature(client, engine, asked, samples):
    chat(client, **asked)
    assert engine.settings[-1].do_sample is samples


def test_a_seed_gives_the_same_answer_and_none_another_each_time(client):
    first, second = (message_of(chat(client, "a cat", seed=4)) for _ in range(2))
    assert first == second
    first, second = (message_of(chat(client, "a cat")) for _ in range(2))
    assert first["images"] != second["images"]


def test_the_ratio_of_sides_becomes_a_size(client, engine):
    assert chat(client, image_config={"aspect_ratio": "3:2"}).status_code == 200
    assert (engine.settings[-1].width, engine.settings[-1].height) == (24, 16)
    found = error(chat(client, image_config={"aspect_ratio": "99:1"}))
    assert found["param"] == "image_config.aspect_ratio"


def test_the_name_of_the_model_and_a_field_may_not_disagree(client):
    assert error(chat(client, model="storyworld:parts", answer_format="images"))["param"] == "answer_format"
    assert chat(client, model="storyworld:parts", answer_format="parts").status_code == 200
    found = error(chat(client, model="storywold"), 404)
    assert found["code"] == "model_not_found" and "'storyworld'" in found["message"]


def test_an_answer_that_was_cut_says_so(client):
    assert chat(client, "a long answer").json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "text", ["<|image|>" * 50, "<image>", "</s><s>[INST]", "USER: x ASSISTANT: y", "\x1b[31m\r\n"]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_a_text_spells_stays_text(client, engine, text, role):
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    messages = [
        {"role": role, "content": text, "name": "<|image|>"},
        {"role": "user", "content": [picture, {"type": "text", "text": text}]},
    ]
    message = message_of(chat(client, messages=messages, modalities=["text"]))
    [document] = engine.documents
    assert [part.text for part in document.parts if isinstance(part, Text)] == [text, text]
    assert len(document.images) == 1
    assert message["content"] == f"0: {text}"


def test_addresses_in_what_a_user_writes_are_text(client, engine, served):
    content = message_of(chat(client, "a cat", answer_format="markdown"))["content"]
    chat(client, content)
    assert shown(engine.documents[-1].parts) == [content]
    gone = f"![image 1]({served.url}/files/{'0' * 32}.png)"
    chat(client, messages=[{"role": "assistant", "content": gone}, {"role": "user", "content": "?"}])
    assert shown(engine.documents[-1].parts) == [gone, "?"]


def test_what_surrounds_an_image_in_markdown_is_read_back_as_its_texts(client, engine):
    content = message_of(chat(client, "a cat", answer_format="markdown"))["content"]
    chat(client, messages=[{"role": "assistant", "content": content}, {"role": "user", "content": "?"}])
    assert shown(engine.documents[-1].parts) == ["0: a cat", ((16, 16), ANY), "2: a cat", "?"]


@pytest.mark.parametrize("text", [" ", "![", "![a](http://x/", "\n"])
def test_a_long_answer_that_is_sent_back_is_searched_in_one_pass(client, engine, text):
    """Two hundred thousand characters: each of them searched from anew would take minutes."""
    text = (text * 200_001)[:200_001]
    asked = [{"role": "assistant", "content": text}, {"role": "user", "content": "?"}]
    found = error(chat(client, messages=asked))
    assert (found["param"], found["code"]) == ("messages", "string_above_max_length")
    asked[0]["content"] = text[:199_999]
    assert chat(client, messages=asked).status_code == 200
    assert shown(engine.documents[-1].parts) == [text[:199_999], "?"]
