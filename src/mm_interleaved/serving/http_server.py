"""uvicorn with what it lacks: time limits for headers, a limit on connections, and a quiet end.

Signals: the first lets what runs finish, while new requests get 503; the second ends at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mm_interleaved.errors import UsageError, escape
from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.guard import HEADER_BYTES
from mm_interleaved.serving.settings import Limits

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5
"""For connections to end by themselves, once nothing runs any more."""
_REASONS = {400: "Bad Request", 503: "Service Unavailable"}


class DrainingServer(uvicorn.Server):
    """A server that answers while it ends.

    Args:
        drain: called once, at the first signal; when it returns, the server ends.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]):
        super().__init__(config)
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._is_asked = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        if self._is_asked:
            # Whoever asks twice does not want to wait for anything, threads included.
            os._exit(128 + signal.SIGINT)
        self._is_asked = True
        assert self._loop is not None, "handlers are set while the server runs"
        self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def protocol_for(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, held to the limits that only a protocol can hold."""

    class GuardedProtocol(H11Protocol):
        """A connection whose headers must come in time."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(raw_error(ApiError(503, "too many connections", retry_after=5)))
                transport.close()
                return
            self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def send_400_response(self, msg: str) -> None:
            """In the shape of all errors."""
            self.transport.write(raw_error(ApiError(400, "not a valid HTTP request", code="invalid_http")))
            self.transport.close()

        def _watch_headers(self) -> None:
            """One timer from the first byte to the last of a request's headers."""
            is_waiting = self.conn.their_state is h11.IDLE
            if not is_waiting:
                self._stop_watching()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(limits.header_seconds, self.transport.close)

        def _stop_watching(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return GuardedProtocol


def raw_error(error: ApiError) -> bytes:
    """An answer as bytes, for connections that no application sees."""
    body = json.dumps(error.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error.headers,
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {_REASONS[error.status]}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises UsageError where it cannot be had."""
    place = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{escape(place)}: cannot listen there ({reason}); choose another --host or --port"
        ) from error
    return found


def server(app: ASGIApp, limits: Limits, drain: Callable[[], Awaitable[None]], **more: Any) -> DrainingServer:
    """A server of an application, ready for `serve`."""
    config = uvicorn.Config(
        app,
        http=protocol_for(limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        backlog=1024,
        **more,
    )
    return DrainingServer(config, drain)
