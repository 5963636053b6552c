"""POST /v1/responses: ordered items, and events that build them up."""

from __future__ import annotations

import base64

import pytest

from mm_interleaved.documents.document import Image, Text
from serving_requests import chunks, error

PATH = "/v1/responses"
IMAGE, TOOL = {"type": "input_image", "image_url": "x"}, {"type": "image_generation"}


def test_texts_and_images_are_items_in_order(client):
    found = client.post(PATH, json={"input": "a cat", "seed": 3}).json()
    assert found["status"] == "completed" and found["object"] == "response"
    assert [item["type"] for item in found["output"]] == ["message", "image_generation_call", "message"]
    assert [item["status"] for item in found["output"]] == ["completed"] * 3
    assert found["output"][2]["content"][0]["text"] == "2: a cat"
    assert base64.b64decode(found["output"][1]["result"]).startswith(b"\x89PNG")
    assert len({item["id"] for item in found["output"]}) == 3


def test_a_stream_builds_the_same_response(client):
    asked = {"input": "a cat", "seed": 3, "layout": "T I T I"}
    whole = client.post(PATH, json=asked).json()["output"]
    found = chunks(client.post(PATH, json=asked | {"stream": True, "partial_images": 1}))
    assert [record["sequence_number"] for record in found] == list(range(len(found)))
    assert [found[0]["type"], found[1]["type"], found[-1]["type"]] == [
        "response.created", "response.in_progress", "response.completed",
    ]  # fmt: skip
    done = [record["item"] for record in found if record["type"] == "response.output_item.done"]
    strip = [{key: value for key, value in item.items() if key != "id"} for item in done]
    assert strip == [{key: value for key, value in item.items() if key != "id"} for item in whole]
    assert found[-1]["response"]["output"] == done
    deltas = "".join(
        r["delta"] for r in found if r["type"] == "response.output_text.delta" and not r["output_index"]
    )
    assert deltas == whole[0]["content"][0]["text"]


def test_each_image_shows_as_many_previews_as_asked_for(client):
    asked = {"input": "a", "stream": True, "layout": "I I", "num_inference_steps": 20}
    tool = {"type": "image_generation", "partial_images": 2}
    found = chunks(client.post(PATH, json=asked | {"tools": [tool]}))
    partial = [r for r in found if r["type"] == "response.image_generation_call.partial_image"]
    assert [(r["output_index"], r["partial_image_index"]) for r in partial] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert all(base64.b64decode(r["partial_image_b64"]).startswith(b"\x89PNG") for r in partial)


def test_items_sent_back_are_read_as_the_parts_that_they_were(client, engine):
    output = client.post(PATH, json={"input": "a cat", "seed": 3, "layout": "T I"}).json()["output"]
    more = {"role": "user", "content": [{"type": "input_text", "text": "and now?"}]}
    asked = {"instructions": "be kind", "input": [{"role": "user", "content": "a cat"}, *output, more]}
    assert client.post(PATH, json=asked).status_code == 200
    parts = engine.documents[-1].parts
    assert [part.role for part in parts] == ["system", "user", "assistant", "assistant", "user"]
    assert [type(part) for part in parts] == [Text, Text, Text, Image, Text]
    assert parts[3].load().size == (16, 16)


def test_the_tool_says_how_images_shall_be(client, engine):
    tool = {"type": "image_generation", "size": "24x16", "output_format": "jpeg"}
    found = client.post(
        PATH, json={"input": "a", "tools": [tool], "tool_choice": {"type": "image_generation"}}
    )
    [item] = found.json()["output"]
    assert item["type"] == "image_generation_call" and item["size"] == "24x16"
    assert base64.b64decode(item["result"]).startswith(b"\xff\xd8")
    client.post(PATH, json={"input": "a", "tool_choice": "none"})
    assert engine.settings[-1].max_images == 0


def test_an_answer_that_was_cut_is_incomplete(client):
    found = client.post(PATH, json={"input": "a long answer"}).json()
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_failure_on_the_way_is_an_event_without_our_insides(client):
    found = chunks(client.post(PATH, json={"input": "fails inside", "stream": True}))
    assert found[-1]["type"] == "response.failed" and found[-1]["response"]["status"] == "failed"
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.image_url"),
        ({"input": [{"type": "image_generation_call", "result": "*"}]}, "input.0.result"),
        ({"input": [{"type": "image_generation_call", "result": None}]}, "input.0.result"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "tools": [TOOL | {"size": "1x"}]}, "tools.0.size"),
        ({"input": "a", "size": "16x16", "tools": [TOOL | {"size": "24x24"}]}, "tools.0.size"),
        ({"input": [{"role": "user", "content": "x"}] * 65}, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(client, asked, param):
    assert error(client.post(PATH, json=asked))["param"] == param
