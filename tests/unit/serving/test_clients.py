"""Clients as they are: OpenAI's own, curl, and what Open WebUI's back end does with what it reads."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import httpx2
import openai
import pytest
from openai import OpenAI

from serving_requests import data_url
from stub_serving import running_server

ASKED = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "a cat"},
            {"type": "image_url", "image_url": {"url": data_url()}},
        ],
    }
]


@pytest.fixture(scope="module")
def own(served):
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_openai_chat(own):
    found = own.chat.completions.create(
        model="storyworld", messages=ASKED, extra_body={"num_inference_steps": 4}, seed=1
    )
    message = found.choices[0].message
    assert message.content == "0: a cat\n\n2: a cat" and found.choices[0].finish_reason == "stop"
    assert message.images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = [*ASKED, message.model_dump(), {"role": "user", "content": "and now?"}]
    assert own.chat.completions.create(model="storyworld:parts", messages=again).choices[0].message.content


def test_openai_chat_streaming(own):
    stream = own.chat.completions.create(
        model="storyworld", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    found = list(stream)
    choices = [choice for chunk in found for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "0: a cat\n\n2: a cat"
    assert sum(len(getattr(choice.delta, "images", None) or ()) for choice in choices) == 1
    assert choices[-1].finish_reason == "stop" and found[-1].usage.completion_tokens > 0


def test_openai_models(own):
    names = [model.id for model in own.models.list()]
    assert names == ["storyworld", "storyworld:images", "storyworld:parts", "storyworld:markdown"]
    assert own.models.retrieve("storyworld:parts").id == "storyworld:parts"


def test_openai_images(own):
    found = own.images.generate(model="storyworld", prompt="a cat", n=2, size="auto")
    assert all(base64.b64decode(image.b64_json).startswith(b"\x89PNG") for image in found.data)
    assert found.usage.output_tokens == 8
    events = list(own.images.generate(model="storyworld", prompt="a cat", stream=True, partial_images=2))
    assert [event.type for event in events][-1] == "image_generation.completed"
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]


def test_openai_responses(own):
    found = own.responses.create(model="storyworld", input="a cat", tools=[{"type": "image_generation"}])
    assert [item.type for item in found.output] == ["message", "image_generation_call", "message"]
    assert found.output_text == "0: a cat2: a cat" and found.usage.total_tokens > 0
    follow_up = [*({"role": "user", "content": "a cat"},), *(item.model_dump() for item in found.output)]
    again = own.responses.create(model="storyworld", input=[*follow_up, {"role": "user", "content": "now?"}])
    assert again.status == "completed"


def test_openai_responses_streaming(own):
    with own.responses.stream(model="storyworld", input="a cat") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["message", "image_generation_call", "message"]
    partial = own.responses.create(
        model="storyworld",
        input="a cat",
        stream=True,
        tools=[{"type": "image_generation", "partial_images": 1}],
    )
    assert "response.image_generation_call.partial_image" in [event.type for event in partial]


def test_openai_errors(own):
    with pytest.raises(openai.BadRequestError) as caught:
        own.chat.completions.create(model="storyworld", messages=ASKED, extra_body={"gidance_scale": 1})
    assert caught.value.param == "gidance_scale" and caught.value.code == "unknown_parameter"
    with pytest.raises(openai.NotFoundError):
        own.chat.completions.create(model="gpt-5", messages=ASKED)
    with pytest.raises(openai.APIError, match="the server failed"):
        list(
            own.chat.completions.create(
                model="storyworld", messages=[{"role": "user", "content": "fails inside"}], stream=True
            )
        )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(served):
    body = json.dumps({"messages": ASKED, "answer_format": "parts"})
    command = [
        "curl",
        "-sS",
        f"{served.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [part["type"] for part in found["choices"][0]["message"]["content"]] == [
        "text",
        "image_url",
        "text",
    ]


def webui_reads(lines) -> tuple[str, list[str]]:
    """What Open WebUI's back end keeps of a stream: content as a string, images of deltas as files."""
    content, files = "", []
    for line in lines:
        if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
            continue
        delta = json.loads(line.removeprefix("data:"))["choices"]
        for choice in delta:
            value = choice["delta"].get("content")
            content += value if isinstance(value, str) else "" if value is None else str(value)
            files += [image["image_url"]["url"] for image in choice["delta"].get("images") or ()]
    return content, files


def test_open_webui_shows_images_as_files_or_in_order(served):
    def read(model):
        asked = {"model": model, "messages": ASKED, "stream": True}
        with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=asked) as response:
            return webui_reads(response.iter_lines())

    content, files = read("storyworld")
    assert content == "0: a cat\n\n2: a cat" and [url[:10] for url in files] == ["data:image"]
    content, files = read("storyworld:markdown")
    assert files == []
    [address] = re.findall(r"!\[[^\]]*\]\((http[^)]+)\)", content)
    assert httpx2.get(address).content.startswith(b"\x89PNG")
    assert content.index("0: a cat") < content.index(address) < content.index("2: a cat")


def test_open_webui_behind_a_name_of_its_own():
    from mm_interleaved.serving.settings import ServerSettings

    with running_server(ServerSettings(public_url="https://pictures.example/mm/")) as running:
        asked = {"messages": ASKED, "answer_format": "markdown"}
        found = httpx2.post(f"{running.url}/v1/chat/completions", json=asked).json()
    assert "(https://pictures.example/mm/files/" in found["choices"][0]["message"]["content"]
