"""Requests to a server and what tests read out of its answers."""

from __future__ import annotations

import base64
import io
import json

from PIL import Image as PILImage


def data_url(size=(20, 10), colour=(200, 30, 40)) -> str:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, colour).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def opened(url: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def chat(client, content="hello", **more):
    """The answer to one message of the user's."""
    messages = more.pop("messages", [{"role": "user", "content": content}])
    return client.post("/v1/chat/completions", json={"messages": messages, **more})


def chunks(response) -> list:
    """The JSON of all events of a stream, whose framing is checked on the way."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block]
    assert response.text.endswith("\n\n")
    found = []
    for block in blocks:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(data) == len([line for line in lines if not line.startswith("event: ")]) <= 1
        found += data
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def error(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert {"message", "type", "param", "code"} <= found.keys()
    return found
