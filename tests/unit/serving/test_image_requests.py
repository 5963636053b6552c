"""POST /v1/images/generations."""

from __future__ import annotations

import base64
import io

import httpx2
import pytest
from PIL import Image as PILImage

from serving_requests import chunks, error

PATH = "/v1/images/generations"


def image_of(record) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(record["b64_json"])))


def test_an_image_of_a_text_is_base64_unless_asked_otherwise(client, engine):
    found = client.post(PATH, json={"prompt": "a cat", "seed": 3}).json()
    [record] = found["data"]
    assert image_of(record).size == (16, 16) and image_of(record).format == "PNG"
    assert found["size"] == "16x16" and found["usage"]["output_tokens"] == 4
    [document] = engine.documents
    # As models are trained: a caption, nobody's turn.
    assert [(part.text, part.role) for part in document.parts] == [("a cat", None)]
    assert engine.settings[0].layout == "I"


def test_an_address_is_given_where_it_is_asked_for(client):
    found = client.post(PATH, json={"prompt": "a cat", "response_format": "url", "seed": 3}).json()
    [record] = found["data"]
    whole = client.post(PATH, json={"prompt": "a cat", "seed": 3}).json()["data"][0]
    assert httpx2.get(record["url"]).content == base64.b64decode(whole["b64_json"])


def test_several_images_have_seeds_of_their_own_which_give_them_again(client):
    records = client.post(PATH, json={"prompt": "a cat", "n": 3, "seed": 10}).json()["data"]
    assert len({record["b64_json"] for record in records}) == 3
    [alone] = client.post(PATH, json={"prompt": "a cat", "seed": 12}).json()["data"]
    assert alone["b64_json"] == records[2]["b64_json"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_files_of_the_kind_that_was_asked_for(client, kind):
    found = client.post(PATH, json={"prompt": "a cat", "output_format": kind, "size": "32x24"}).json()
    assert image_of(found["data"][0]).format == kind.upper() and found["size"] == "32x24"


def test_partial_images_are_streamed_before_the_image(client):
    asked = {"prompt": "a cat", "stream": True, "partial_images": 3, "num_inference_steps": 20}
    found = chunks(client.post(PATH, json=asked))
    assert [record["type"] for record in found] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [record["partial_image_index"] for record in found[:3]] == [0, 1, 2]
    assert found[-1]["usage"]["total_tokens"] > 0 and image_of(found[-1]).size == (16, 16)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": "a", "n": 3, "num_candidates": 3}, "n"),
        ({"prompt": "a", "response_format": "gif"}, "response_format"),
        ({"prompt": "a", "response_format": "url", "stream": True}, "response_format"),
        ({"prompt": "a", "background": "transparent"}, "background"),
        ({"prompt": "a", "layout": "T"}, "layout"),
        ({"prompt": "too long"}, "messages"),
    ],
)
def test_what_cannot_be_is_named(client, asked, param):
    assert error(client.post(PATH, json=asked))["param"] == param


def test_a_refused_image_of_several_frees_the_others(client, engine):
    engine.max_running, engine.max_queue = 2, 0
    try:
        found = client.post(PATH, json={"prompt": "a slow cat", "n": 3})
        assert error(found, 429) and found.headers["retry-after"] == "2"
        assert not engine.running and not engine.waiting
    finally:
        engine.max_running, engine.max_queue = 8, 64


def test_an_image_much_larger_than_the_models_own_is_refused(client):
    """Attention takes the square of its pixels, so that one would hold up everybody for minutes."""
    largest = client.post(PATH, json={"prompt": "a cat", "size": "64x64"}).json()
    assert image_of(largest["data"][0]).size == (64, 64)
    found = client.post(PATH, json={"prompt": "a cat", "size": "64x72"})
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == "size"
    assert "found 64 x 72 pixels, expected at most 4096 in all, such as 64x64" in error["message"]
