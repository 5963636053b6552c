"""The client behind a request: whether it still waits, and how its answer is sent as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mm_interleaved.serving.errors import ClientLeftError

Result = TypeVar("Result")
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Client:
    """Watches a connection from the end of the request's body on."""

    def __init__(self, request: Request):
        self.id: str = request.scope["state"]["request_id"]
        self.left = asyncio.ensure_future(_until_left(request.receive))

    async def wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of some work. Raises ClientLeftError, the work cancelled, when nobody waits for it."""
        doing = asyncio.ensure_future(work)
        try:
            await asyncio.wait({doing, self.left}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise ClientLeftError
        finally:
            if not doing.done():
                doing.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await doing

    def close(self) -> None:
        """Watches no longer."""
        self.left.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any, name: str | None = None) -> bytes:
    """One event of a stream; whatever it holds, it is one line."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events.

    Args:
        chunks: what is sent.
        leave: frees what the answer holds; called whatever happens, also if nothing was sent.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], leave: Callable[[], Awaitable[None]]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._leave = chunks, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._chunks) as chunks:
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._leave()


async def all_of(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all, which go on side by side; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
