"""A server without a model for tests of everything around it: an engine that echoes, and a server to talk to.

The engine follows the layout. What it writes holds the last words it was given, so that no answer can be
taken for another's; words in the request say what else it does: `slow`, `raises`, `too long`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import socket
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import MMInterleavedError, TooLongError
from mm_interleaved.generation.events import (
    Failed,
    Finished,
    ImageDone,
    ImagePreview,
    ImageStarted,
    TextDelta,
)
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.serving.engine_statistics import Counts, EngineStatistics
from mm_interleaved.serving.http_server import DrainingServer, listening_socket, server
from mm_interleaved.serving.refusals import Draining, QueueFull
from mm_interleaved.serving.settings import ServerSettings

IMAGE_TOKENS = 4


@dataclass
class StubUsage:
    prompt_tokens: int = 0
    reused_tokens: int = 0
    text_tokens: int = 0
    images: int = 0


PREFIXES = {
    "prefix_hits": 3, "prefix_misses": 1, "prefix_tokens": 40,
    "prefix_images": 2, "prefix_bytes": 1000, "prefix_entries": 1,
}  # fmt: skip


class StubAdmission:
    """A model of 16 by 16 pixels whose images may have any size."""

    image_tokens = IMAGE_TOKENS

    def settings(self, document: Document, given: Mapping[str, Any]) -> GenerationSettings:
        return settings_for(document, {"num_inference_steps": 4}, given)

    def size_for(self, ratio: tuple[int, int]) -> tuple[int, int]:
        return (16, 16) if ratio == (1, 1) else (8 * ratio[1], 8 * ratio[0])


class StubTicket:
    def __init__(self, engine: StubEngine, number: int, document: Document, settings, preview_every: int):
        self.usage = StubUsage(prompt_tokens=len(document.text.split()) + IMAGE_TOKENS * len(document.images))
        self._engine, self._number, self.is_over = engine, number, False
        self._events = self._happen(document, settings, preview_every)

    def __aiter__(self):
        return self._events

    async def cancel(self):
        if not self.is_over:
            self.is_over = True
            self._engine.leave(self, "aborted")

    async def _happen(self, document: Document, settings: GenerationSettings, preview_every: int):
        while self not in self._engine.running:
            await asyncio.sleep(0.001)
        last = next((part.text for part in reversed(document.parts) if isinstance(part, Text)), "")
        completed, rng = document, np.random.default_rng(settings.seed)
        if "raises" in last:
            raise RuntimeError("a secret of /etc/stub")
        if "fails inside" in last:
            yield self._end(Failed(MMInterleavedError("a secret of /etc/stub")))
            return
        # As the real engine of a chat: a text, an image, a text; no image where none is wanted.
        auto = "T I T" if settings.max_images else "T"
        for index, letter in enumerate((auto if settings.layout == "auto" else settings.layout).split()):
            await self._wait(last)
            if letter == "T":
                text = f"{index}: {last}"
                for word in text.split(" "):
                    self.usage.text_tokens += 1
                    yield TextDelta(word if word == f"{index}:" else f" {word}")
                completed = completed.extended(Text(text, generated=True))
            else:
                yield ImageStarted(len(completed.images))
                size = (settings.height or 16, settings.width or 16, 3)
                picture = PILImage.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
                steps = settings.num_inference_steps
                for step in range(preview_every, steps, preview_every) if preview_every else ():
                    await self._wait(last)
                    yield ImagePreview(picture, step)
                await self._wait(last)
                self.usage.images += 1
                self._engine.counts.images += 1
                yield ImageDone(picture, settings.seed + index)
                completed = completed.extended(Image(picture, generated=True))
        yield self._end(Finished("length" if "long answer" in last else "layout", completed))

    def _end(self, event):
        if not self.is_over:
            self.is_over = True
            self._engine.leave(self, "finished")
        return event

    async def _wait(self, text: str):
        if "slow" in text:
            await asyncio.sleep(self._engine.slow_seconds)
        elif self._engine.seconds:
            await asyncio.sleep(self._engine.seconds)


class StubEngine:
    """The interface of ServingEngine."""

    def __init__(self, *, max_running: int = 8, max_queue: int = 64, seconds: float = 0.0):
        self.max_running, self.max_queue, self.seconds, self.slow_seconds = (
            max_running,
            max_queue,
            seconds,
            0.2,
        )
        self.running: list[StubTicket] = []
        self.waiting: list[StubTicket] = []
        self.documents: list[Document] = []
        self.settings: list[GenerationSettings] = []
        self.counts, self.healthy, self.is_draining = Counts(), True, False
        self._numbers = itertools.count()

    def start(self):
        self.healthy = True

    async def open(self, document: Document, settings: GenerationSettings, *, preview_every: int = 0):
        if self.is_draining:
            raise Draining("the server is shutting down", 3)
        if len(self.running) + len(self.waiting) >= self.max_running + self.max_queue:
            self.counts.refused += 1
            raise QueueFull("no place", 1.2)
        if "too long" in document.text:
            raise TooLongError("the document has 9000 tokens, expected at most 2048")
        self.documents.append(document)
        self.settings.append(settings)
        ticket = StubTicket(self, next(self._numbers), document, settings, preview_every)
        self.waiting.append(ticket)
        self._fill()
        return ticket

    def leave(self, ticket: StubTicket, outcome: str):
        for tickets in (self.running, self.waiting):
            if ticket in tickets:
                tickets.remove(ticket)
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)
        self._fill()

    def _fill(self):
        while self.waiting and len(self.running) < self.max_running:
            self.running.append(self.waiting.pop(0))

    def statistics(self) -> EngineStatistics:
        self.counts.queued, self.counts.running = len(self.waiting), len(self.running)
        return EngineStatistics(**asdict(self.counts), **PREFIXES, batch_sizes={"text": {1: 5, 2: 7}})

    async def drain(self, grace: float):
        self.is_draining = True
        for _ in range(int(grace / 0.01)):
            if not self.running and not self.waiting:
                return
            await asyncio.sleep(0.01)

    def close(self):
        pass


def digest(image: PILImage.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@dataclass
class Running:
    """A server in a thread."""

    engine: StubEngine
    port: int
    server: DrainingServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running_server(settings: ServerSettings | None = None, engine: Any = None, admission: Any = None):
    """A real server on a free port, as long as the block lasts."""
    from mm_interleaved.serving.app import create_app

    settings, engine = settings or ServerSettings(), engine or StubEngine()
    app = create_app(engine, settings, admission=admission or StubAdmission())

    async def nothing():
        pass

    running = server(app, settings.limits, nothing)
    listening = listening_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        yield Running(engine, port, running)
    finally:
        running.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def raw(port: int, data: bytes, *, seconds: float = 5.0) -> bytes:
    """What a server answers to bytes, until it closes the connection or nothing comes any more."""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(data)
        connection.settimeout(seconds)
        found = b""
        try:
            while chunk := connection.recv(65536):
                found += chunk
        except TimeoutError:
            found += b"<still open>"
        except ConnectionResetError:
            pass
        return found


def main() -> None:
    """`python tests/stub_serving.py SECONDS GRACE`: a server of its own process; prints its port."""
    import sys

    from mm_interleaved.serving.app import create_app, drain

    settings = ServerSettings()
    engine = StubEngine(max_running=32, max_queue=1000, seconds=float(sys.argv[1]))
    app = create_app(engine, settings, admission=StubAdmission())
    listening = listening_socket("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    running = server(app, settings.limits, lambda: drain(app, float(sys.argv[2])))
    asyncio.run(running.serve([listening]))


if __name__ == "__main__":
    main()
