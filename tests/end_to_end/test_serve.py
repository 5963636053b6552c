"""`serve` as it is typed: a whole tiny model behind HTTP, from its first line to its exit code."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved import Document, Text
from mm_interleaved.documents.document import Image
from mm_interleaved.generation.loading import load_generator
from serving_requests import chat, chunks, data_url, error


class Server:
    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "mm_interleaved", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.first_line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.first_line)
        assert found, (self.first_line, self.process.poll(), self.process.stderr.read())
        self.client = httpx2.Client(base_url=found[0], timeout=120)

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def serving(tiny_folder):
    server = Server("--model", str(tiny_folder))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def generator(tiny_folder):
    return load_generator(tiny_folder)


def shown(message):
    pictures = [image["image_url"]["url"].partition("base64,")[2] for image in message["images"]]
    pixels = [np.asarray(PILImage.open(io.BytesIO(base64.b64decode(each)))) for each in pictures]
    return message["content"], pixels


def alone(generator, document, **settings):
    parts = generator.generate(document, **settings).parts[len(document.parts) :]
    texts = [part.text for part in parts if isinstance(part, Text)]
    return "\n\n".join(texts), [np.asarray(part.load()) for part in parts if isinstance(part, Image)]


def same(found, expected) -> bool:
    """Texts are the same; pixels but for the last bits of the numbers behind them, whoever ran beside."""
    pairs = zip(found[1], expected[1], strict=True)
    return found[0] == expected[0] and all(np.abs(a.astype(int) - b).max() <= 2 for a, b in pairs)


ASKED = {"layout": "T I T I", "max_tokens": 12, "num_inference_steps": 3}


def message_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def test_the_first_line_has_the_address_and_a_request_that_works(serving):
    command = serving.process.stdout.readline()
    assert command.startswith("curl http://127.0.0.1:")
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert '"image_url"' in found.stdout, found.stderr


def test_an_answer_is_the_one_that_the_generator_gives(serving, generator):
    picture = data_url((40, 30), (10, 200, 90))
    content = [
        {"type": "text", "text": "Pip finds <|image|>"},
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "in the garden."},
    ]
    found = shown(message_of(chat(serving.client, content, seed=11, **ASKED)))
    image = Image(base64.b64decode(picture.partition(",")[2]), role="user")
    parts = [Text("Pip finds <|image|>", role="user"), image, Text("in the garden.", role="user")]
    document = Document(id="x", parts=parts, generation={"seed": 11})
    expected = alone(generator, document, max_new_tokens=12, layout="T I T I", num_inference_steps=3)
    assert len(found[1]) == 2 and same(found, expected)


def test_answers_beside_each_other_are_those_alone_and_bad_requests_change_nothing(serving):
    def ask(seed):
        return shown(message_of(chat(serving.client, f"Pip finds lamp {seed}", seed=seed, **ASKED)))

    first = [ask(seed) for seed in range(3)]
    with ThreadPoolExecutor(9) as pool:
        bad = [
            pool.submit(chat, serving.client, "x" * 9000),
            pool.submit(chat, serving.client, "x", size="33x7"),
            pool.submit(chat, serving.client, "x", size="36x35"),
            pool.submit(chat, serving.client, "x", steps=3),
            pool.submit(chat, serving.client, "x", context_images="5"),
        ]
        together = list(pool.map(ask, range(3)))
    assert all(same(*pair) for pair in zip(together, first, strict=True))
    found = [each.result() for each in bad]
    assert [each.status_code for each in found] == [400, 400, 400, 400, 200], [each.text for each in found]
    assert error(found[0])["code"] == "context_length_exceeded" and error(found[2])["param"] == "size"


def test_a_stream_is_the_same_answer_and_usage_counts_its_tokens(serving):
    asked = {**ASKED, "seed": 4}
    whole = chat(serving.client, "Pip", **asked).json()
    *parts, usage, done = chunks(
        chat(
            serving.client,
            "Pip",
            stream=True,
            stream_options={"include_usage": True},
            partial_images=1,
            **asked,
        )
    )
    deltas = [part["choices"][0]["delta"] for part in parts]
    message = whole["choices"][0]["message"]
    assert done == "[DONE]" and "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    images = [image for delta in deltas for image in delta.get("images", ()) if not image.get("preview")]
    assert images == message["images"]
    previews = [image for delta in deltas for image in delta.get("images", ()) if image.get("preview")]
    assert len(previews) == 2
    for name in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert usage["usage"][name] == whole["usage"][name]
    # An image is its start and three slots.
    assert whole["usage"]["completion_tokens_details"]["image_tokens"] == 8


def metric(client, name: str) -> float:
    text = client.get("/metrics").text
    return float(re.search(rf"^mm_interleaved_{name} (\S+)$", text, re.MULTILINE)[1])


def test_one_more_turn_of_a_conversation_is_answered_out_of_what_is_remembered(serving):
    hits = metric(serving.client, "prefix_hits_total")
    first = [{"role": "user", "content": "Pip finds a lamp in the garden."}]
    answer = message_of(chat(serving.client, messages=first, seed=1, layout="T I", num_inference_steps=2))
    more = [*first, answer, {"role": "user", "content": "And now?"}]
    asked = {"messages": more, "layout": "T I", "num_inference_steps": 2, "seed": 5}
    found, again = (chat(serving.client, **asked).json() for _ in range(2))
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 10
    assert metric(serving.client, "prefix_hits_total") > hits and metric(serving.client, "prefix_bytes") > 0
    assert found["choices"] == again["choices"]


def test_a_client_that_leaves_in_the_middle_of_an_image_frees_its_place(serving):
    aborted = metric(serving.client, "aborted_total")
    asked = {"layout": "I", "num_inference_steps": 250, "stream": True, "partial_images": 3}
    body = {"messages": [{"role": "user", "content": "Pip"}], **asked}
    with serving.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    ends = time.monotonic() + 5
    while time.monotonic() < ends and metric(serving.client, "aborted_total") == aborted:
        time.sleep(0.05)
    assert metric(serving.client, "aborted_total") == aborted + 1 and metric(serving.client, "running") == 0


def ends(*arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "mm_interleaved", "serve", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)
    return found.returncode, found.stderr


def test_what_is_wrong_is_said_before_a_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = ends("--port", port)
    assert code == 2 and f"127.0.0.1:{port}" in said and "--port" in said and said.count("\n") == 1
    code, said = ends("--public-url", "pictures.example")
    assert code == 2 and "public_url" in said
    code, said = ends("--image-host", "http://a")
    assert code == 2 and "image_host" in said
    code, said = ends("--api-key-file", "/nowhere/keys")
    assert code == 3 and "/nowhere/keys" in said


def test_a_missing_extra_is_named_with_its_command():
    program = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"
        "from mm_interleaved.cli.main import run\n"
        "sys.exit(run(['serve']))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "pip install 'mm-interleaved[serve]'" in found.stderr and found.stderr.count("\n") == 1


def test_the_help_loads_no_server():
    program = (
        "import sys\nfrom mm_interleaved.cli.main import run\nrun(['serve', '--help'])\n"
        "assert not {'fastapi', 'uvicorn', 'httpcore2', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0


def test_a_signal_lets_what_runs_finish(serving):
    """The last of this file's server: it ends by it."""
    with ThreadPoolExecutor(4) as pool:
        asked = {"layout": "I", "num_inference_steps": 100}
        running = [pool.submit(chat, serving.client, f"Pip {number}", **asked) for number in range(4)]
        while metric(serving.client, "running") < 4:
            time.sleep(0.02)
        serving.process.send_signal(signal.SIGTERM)
        while serving.client.get("/ready").status_code == 200:
            time.sleep(0.01)
        refused = chat(serving.client, "Pip")
        assert error(refused, 503)["code"] == "draining" and int(refused.headers["retry-after"]) > 0
        assert all(len(message_of(each.result())["images"]) == 1 for each in running)
    assert serving.process.wait(30) == 0
    assert "Traceback" not in serving.process.stderr.read()
