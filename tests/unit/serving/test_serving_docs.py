"""docs/serving.md says what is so: its requests work, its limits are the defaults, its flags exist."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest

from mm_interleaved.cli.main import create_app
from mm_interleaved.serving.chat_request import ChatRequest
from mm_interleaved.serving.responses_request import ResponsesRequest
from mm_interleaved.serving.settings import Limits

TEXT = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def test_the_request_of_curl_works(client):
    [body] = [re.search(r"-d '(\{.*\})'", code, re.DOTALL)[1] for kind, code in BLOCKS if "curl" in code]
    found = client.post("/v1/chat/completions", json=json.loads(body))
    assert found.status_code == 200 and len(found.json()["choices"][0]["message"]["images"]) == 2


def test_the_example_of_openais_client_works(served):
    [code] = [code for kind, code in BLOCKS if kind == "python"]
    ast.parse(code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("http://127.0.0.1:8000", served.url), {})
    assert printed.getvalue().startswith("data:image/png;base64,")


def test_its_fields_and_flags_exist():
    section = TEXT.partition("### Fields")[2].partition("## Chat pages")[0]
    known = set(ChatRequest.model_fields) | set(ResponsesRequest.model_fields)
    named = {name.partition(".")[0] for name in re.findall(r"`([a-z][a-z_]+(?:\.[a-z_]+)?)`", section)}
    assert named - known <= {"extra_body", "png", "jpeg", "webp", "image_generation"}
    serve = next(each for each in create_app().registered_commands if each.callback.__name__ == "serve")
    parameters = set(serve.callback.__annotations__)
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", TEXT)}
    spelt = {"api_key": "api_keys", "allowed_host": "allowed_hosts", "cors_origin": "cors_origins"}
    spelt |= {"image_host": "image_hosts"}
    assert {spelt.get(flag, flag) for flag in flags} <= parameters


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ("body", ["32 MB"]),
        ("messages, images, pixels", ["64, 8, 40 million, 200,000"]),
        ("tokens, images, steps", ["4,096, 8, 250, 1 million", "16 times the model's own", "256 x 256"]),
        ("time of a request", ["10 minutes"]),
        ("time for headers", ["10 s; 10 s", "32 kB"]),
        ("time that an answer", ["30 s"]),
        ("images behind addresses", ["an hour, 256 MB"]),
    ],
)
def test_its_table_of_limits_holds_the_defaults(row, values):
    [line] = [line for line in TEXT.splitlines() if line.startswith(f"| {row}")]
    assert all(value in line for value in values)
    limits = Limits()
    assert (limits.body_bytes, limits.messages, limits.images, limits.pixels) == (
        32 * 2**20,
        64,
        8,
        40_000_000,
    )
    assert (limits.characters, limits.new_tokens, limits.new_images) == (200_000, 4096, 8)
    assert (limits.inference_steps, limits.output_pixels, limits.seconds) == (250, 2**20, 600)
    assert limits.times_own_pixels == 16 and math.isqrt(16 * 64 * 64) == 256
    assert (limits.header_seconds, limits.body_seconds, limits.body_bytes_per_second) == (10, 10, 32 * 2**10)
    assert (limits.write_seconds, limits.file_seconds, limits.files_bytes) == (30, 3600, 256 * 2**20)
