"""What is no request, or asks for what cannot be: 400 with its place, and the server as well as before."""

from __future__ import annotations

import base64
import json

import pytest

from mm_interleaved.serving.settings import Limits
from serving_requests import chat, data_url, error

HELLO = {"role": "user", "content": "hello"}
POSTS = ("/v1/chat/completions", "/v1/responses", "/v1/images/generations")


@pytest.fixture(autouse=True)
def _exact_afterwards(client):
    """Whatever was asked, the next answer is the one that it would have been."""
    yield
    message = chat(client, "after", seed=1, layout="T").json()["choices"][0]["message"]
    assert message["content"] == "0: after"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        json.dumps({"messages": [HELLO]}).encode("utf-16"),
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "\\ud800"}',
        b'{"model": "a", "model": "b"}',
        b'{"messages": []} {}',
    ],
)
def test_a_body_that_is_no_object_of_json(client, path, body):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert error(response)["type"] == "invalid_request_error"
    assert response.elapsed.total_seconds() < 0.5


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_body_of_another_kind_is_not_looked_at(client, path, kind):
    response = client.post(path, content=b"{}", headers={"Content-Type": kind})
    assert "application/json" in error(response, 415)["message"]


WRONG = {
    "max_tokens": [-1, 0, 10**9, True, "5", 1.5, [1]],
    "max_completion_tokens": [0, 5000],
    "n": [0, 2, 10**9, True],
    "temperature": [-1, 2.1, "1", True, [0.5]],
    "top_p": [0, 1.5, False],
    "top_k": [0, 1.5],
    "seed": [-1, 2**63, 1.0, "1", True],
    "stream": ["true", 1],
    "num_inference_steps": [0, -1, 251, 10**9, 2.5],
    "guidance_scale": [-1, "7"],
    "negative_prompt": [5, "x" * 10_001],
    "size": ["16", "0x16", "16x", "99999x16", "4x16", "2000x2000", 16],
    "width": [7, 5000, "16"],
    "scheduler": ["eular", 5],
    "layout": ["T X", "I " * 9, "T " * 70, ""],
    "max_images": [-1, 9],
    "modalities": [[], ["audio"], "text", ["text", "image", "text"]],
    "num_candidates": [0, 9],
    "num_beams": [0, 9],
    "context_images": ["some", [-1], [1.5]],
    "output_format": ["gif", 1],
    "answer_format": ["html"],
    "partial_images": [4, -1],
    "messages": [[], {}, "hello", None, [5]],
    "model": [5, "x" * 300],
    "tools": [[{"type": "function"}]],
    "stop": [["\n"]],
    "logprobs": [True],
    "presence_penalty": [0.5],
    "stream_options": [{"include_usage": 1}, True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_named(client, name, value):
    response = client.post("/v1/chat/completions", json={"messages": [HELLO], name: value})
    found = error(response)
    assert found["param"].split(".")[0] in (name, "size"), found
    assert found["message"].startswith(found["param"])
    assert len(found["message"]) < 400


IDLE = {
    "n": 1, "user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "tools": [],
    "stop": None, "logit_bias": {}, "response_format": {"type": "text"}, "logprobs": False, "seed": 0,
    "service_tier": "auto", "temperature": 1, "guidance_scale": 7, "parallel_tool_calls": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), list(IDLE.items()))
def test_what_clients_send_without_wanting_anything_is_taken(client, name, value):
    assert chat(client, **{name: value}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "nearest"),
    [
        ("/v1/chat/completions", "messagess", "messages"),
        ("/v1/chat/completions", "gidance_scale", "guidance_scale"),
        ("/v1/chat/completions", "steps", "num_inference_steps"),
        ("/v1/responses", "inputs", "input"),
        ("/v1/images/generations", "prompts", "prompt"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(client, path, name, nearest):
    valid = {"messages": [HELLO]} if "chat" in path else {"input": "a", "prompt": "a"}
    valid = {key: value for key, value in valid.items() if key in ("messages", "input", "prompt")}
    if "responses" in path:
        del valid["prompt"]
    elif "images" in path:
        del valid["input"]
    found = error(client.post(path, json=valid | {name: 1}))
    assert found["param"] == name and found["code"] == "unknown_parameter"
    assert f"did you mean '{nearest}'?" in found["message"]


@pytest.mark.parametrize(
    "name", ["mm_processor_kwargs", "__class__", "chat_template", "a\r\nb", "\x1b[2J", "x" * 500]
)
def test_any_unknown_name_is_refused(client, name):
    found = error(chat(client, **{name: {}}))
    assert found["code"] == "unknown_parameter"
    assert found["message"].isprintable() and len(found["message"]) < 3000


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([HELLO, {"role": "user", "content": 5}], "messages.1.content"),
        ([{"role": "user", "content": [{"type": "text", "txt": "x"}]}], "messages.0.content.0.txt"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.image_url"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
            "messages.0.content.0.image_url.url",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            "messages.0.content.0.type",
        ),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls"),
    ],
)
def test_a_wrong_message_is_named_by_its_place(client, messages, param):
    assert error(chat(client, messages=messages))["param"] == param


def image_message(*urls):
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": content}]


def bomb() -> str:
    """A PNG of 100 bytes that says it has 30,000 × 30,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def encoded(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (bomb(), "pixels"),
        (data_url((64, 64))[:-60], "damaged"),
        (data_url() + "*", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png,abc", "data:image/png;base64"),
        ("data:", "data:image/png;base64"),
        (encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "SVG"),
        (encoded(b"<html><script>alert(1)</script>", "text/html"), "HTML"),
        (encoded(b"%PDF-1.7"), "PDF"),
        ("", "found the address"),
        ("file:///etc/passwd", "fetches nothing"),
        ("file://localhost/../etc/passwd", "fetches nothing"),
        ("/etc/passwd", "fetches nothing"),
        ("%2e%2e/etc/passwd", "fetches nothing"),
        ("http://127.0.0.1:1/x.png", "fetches nothing"),
        ("https://example.org/x.png", "fetches nothing"),
    ],
)
def test_an_image_that_is_none_is_named_by_its_place(client, url, says):
    found = error(chat(client, messages=image_message(data_url(), url)))
    assert found["param"] == "messages.0.content.1.image_url.url"
    assert says in found["message"] and "root:" not in found["message"]


def test_counts_are_checked_before_anything_is_decoded(client, engine, monkeypatch):
    def never(*arguments):
        raise AssertionError("nothing is decoded")

    monkeypatch.setattr("mm_interleaved.serving.content.decoded_base64", never)
    limits = Limits()
    found = error(chat(client, messages=image_message(*[data_url()] * (limits.images + 1))))
    assert found["code"] == "too_many_images" and f"at most {limits.images}" in found["message"]
    found = error(chat(client, messages=[HELLO] * (limits.messages + 1)))
    assert found["param"] == "messages" and f"at most {limits.messages}" in found["message"]
    found = error(chat(client, "x" * (limits.characters + 1)))
    assert f"at most {limits.characters}" in found["message"]
    assert engine.documents == []


def test_pixels_are_summed_over_all_images_before_any_is_decoded(client, monkeypatch):
    monkeypatch.setattr("mm_interleaved.serving.content.open_image", None)
    large = data_url((4000, 2600))
    found = error(chat(client, messages=image_message(large, large, large, large)))
    assert found["code"] == "too_many_pixels" and found["param"] == "messages.0.content.3.image_url.url"


def test_what_does_not_fit_the_context_is_told_with_both_numbers(client):
    found = error(chat(client, "this is too long"))
    assert found["code"] == "context_length_exceeded"
    assert "9000" in found["message"] and "2048" in found["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"size": "16x16", "width": 16},
        {"guidance_scale": 2.0, "true_cfg_scale": 3.0},
        {"layout": "T I", "modalities": ["text"]},
        {"do_sample": True, "num_beams": 2},
    ],
)
def test_what_contradicts_itself_is_refused(client, asked):
    assert error(chat(client, **asked))["param"] in asked


def test_images_and_their_candidates_are_counted_together(client, engine):
    """Where the layout is left to the model, too; and what nobody said gives way."""
    found = chat(client, num_candidates=4)
    assert found.status_code == 200 and engine.settings[-1].max_images == 2
    found = error(chat(client, num_candidates=4, max_images=3))
    assert found["param"] == "max_images" and "found 3 images of 4 candidates each" in found["message"]
    assert chat(client, num_candidates=4, modalities=["text"]).status_code == 200
