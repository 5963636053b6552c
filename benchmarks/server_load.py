"""`python -m benchmarks.server_load [--serve MODEL | --url URL]`: requests a second of a server.

It first asks some questions one after the other, then all requests at once, and compares each answer with
the one that was given alone. `--serve stub` has an engine that echoes: what is measured then is the HTTP
side; `--serve tiny` a model of some ten thousand random parameters: the engine as well. Server and clients
share the machine; `cpu_ms` is what the server took of a core for each request. The last line is one JSON
object; exits 1 where an answer was lost or is another's.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image as PILImage

KINDS: dict[str, dict[str, Any]] = {
    "text": {"layout": "T", "max_tokens": 1},
    "story": {"layout": "T I", "max_tokens": 8, "num_inference_steps": 4},
}
"""The smallest requests, of text and with an image."""
PIXEL_LEVELS = 1.0
"""Mean difference, of 0 to 255, up to which an image is the same; those of two seeds differ by tens."""
QUESTIONS = 8
"""Different ones, each with a nonce of its own."""


def tiny_folder(folder: Path) -> Path:
    """A whole model with random weights, in a folder."""
    from tests.tiny import tiny_model, tiny_processor

    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@contextmanager
def served(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server as `serve` starts it: its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        name = str(tiny_folder(Path(folder))) if model == "tiny" else model
        command = [sys.executable, "-m", "mm_interleaved", "serve", "--port", "0", "--model", name]
        command += ["--max-queue", "1000"]
        if model == "stub":
            command = [sys.executable, "tests/stub_serving.py", "0.002", "10"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"\d+$|:(\d+)/", process.stdout.readline().strip())
            assert found is not None, f"the server ended with {process.wait()}"
            yield f"http://127.0.0.1:{found[1] or found[0]}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def facts(process: psutil.Process) -> tuple[float, int]:
    """Seconds of a core that a process took so far, and its megabytes."""
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss // 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request was answered."""

    status: int
    text: str
    pixels: np.ndarray
    """(values,) of all its images, 0 to 255."""
    seconds: float

    def is_same(self, other: Answer) -> bool:
        """Beside others, images differ from those alone in the last bits of the numbers behind them."""
        if (self.status, self.text, self.pixels.shape) != (other.status, other.text, other.pixels.shape):
            return False
        return not len(self.pixels) or float(np.abs(self.pixels - other.pixels).mean()) < PIXEL_LEVELS


def pixels_of(url: str) -> np.ndarray:
    """(values,) of an image in its own address."""
    with PILImage.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return np.asarray(image, dtype=np.float32).ravel()


async def ask(client: httpx2.AsyncClient, kind: str, number: int) -> Answer:
    """One request."""
    body = {"messages": [{"role": "user", "content": f"nonce {number:04d}"}], "seed": number, **KINDS[kind]}
    began = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - began
    if response.status_code != 200:
        return Answer(response.status_code, response.text, np.empty(0), seconds)
    message = response.json()["choices"][0]["message"]
    images = [pixels_of(image["image_url"]["url"]) for image in message["images"]]
    return Answer(200, message["content"], np.concatenate([np.empty(0), *images]), seconds)


async def load(url: str, kind: str, requests: int, clients: int) -> dict[str, Any]:
    """All requests, so many at once."""
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = [await ask(client, kind, number) for number in range(QUESTIONS)]
        gate = asyncio.Semaphore(clients)

        async def one(number: int) -> Answer:
            async with gate:
                return await ask(client, kind, number % QUESTIONS)

        began = time.perf_counter()
        found = await asyncio.gather(*map(one, range(requests)))
        seconds = time.perf_counter() - began
    times = sorted(each.seconds for each in found)
    mixed = sum(not each.is_same(alone[number % QUESTIONS]) for number, each in enumerate(found))
    return {
        "kind": kind,
        "requests": requests,
        "clients": clients,
        "requests_per_second": round(requests / seconds, 2),
        "one_after_the_other": round(QUESTIONS / sum(each.seconds for each in alone), 2),
        "p50": round(times[len(times) // 2], 3),
        "p99": round(times[int(len(times) * 0.99)], 3),
        "statuses": dict(Counter(each.status for each in found)),
        "mixed": mixed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Requests a second of a server, none lost and none mixed.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--serve", default="tiny", metavar="MODEL", help="stub, tiny, storyworld, a folder, a hub id"
    )
    where.add_argument("--url", help="of a server that runs, such as http://127.0.0.1:8000")
    parser.add_argument("--kind", choices=KINDS, default="text")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=200)
    asked = parser.parse_args()
    with served(asked.serve) if asked.url is None else nullcontext((asked.url, None)) as (url, process):
        before = None if process is None else facts(process)
        result = asyncio.run(load(url, asked.kind, asked.requests, asked.clients))
        if process is not None and before is not None:
            after = facts(process)
            result["cpu_ms"] = round(1e3 * (after[0] - before[0]) / (asked.requests + QUESTIONS), 1)
            result["rss_mb"] = [before[1], after[1]]
    result["model"], result["cores"] = asked.url or asked.serve, len(psutil.Process().cpu_affinity())
    print(json.dumps(result))
    return 0 if not result["mixed"] and result["statuses"] == {200: asked.requests} else 1


if __name__ == "__main__":
    sys.exit(main())
