"""The outermost layer, before any framework: ids, sizes, times, and no error that says more than it should.

Limits are held here because a framework reads bodies whole before it looks at them, and uvicorn has no time
limits for bodies and for clients that do not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_interleaved.serving.errors import ApiError, ClientLeftError, api_error, log_text
from mm_interleaved.serving.metrics import Metrics
from mm_interleaved.serving.settings import Limits

logger = logging.getLogger(__name__)

HEADER_BYTES = 32 * 2**10
"""Of a request line with its headers."""
MAX_HEADERS = 100
SKIPPED_BYTES, SKIPPED_SECONDS = 2**20, 0.5
LEFT = 499
"""The status in the log of a request whose client has left; nobody is told."""


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limits)
        self._running += 1
        try:
            self._check(scope, exchange)
            await self._app(scope, exchange.receive, exchange.send)
        except ClientLeftError:
            exchange.status = LEFT
        except Exception as error:
            await self._tell(error, exchange)
        finally:
            self._running -= 1
            self._log(exchange)

    def _check(self, scope: Scope, exchange: _Exchange) -> None:
        """What can be refused by the headers. Raises ApiError."""
        names = [name for name, _ in scope["headers"]]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise _ending(400, "found both Content-Length and Transfer-Encoding, expected one")
        if scope["http_version"] not in ("1.0", "1.1"):
            raise _ending(400, "expected HTTP/1.1")
        # The protocol limits headers that come in pieces; in one piece, they are as long as they like.
        length = sum(len(name) + len(value) for name, value in scope["headers"])
        if length + len(scope["raw_path"]) + len(scope["query_string"]) > HEADER_BYTES:
            raise _ending(431, f"the headers are longer than {HEADER_BYTES} bytes")
        if len(names) > MAX_HEADERS:
            raise _ending(431, f"found {len(names)} headers, expected at most {MAX_HEADERS}")
        if self._running > self._limits.requests:
            raise ApiError(
                503, f"{self._limits.requests} requests are open already", code="overloaded", retry_after=5
            )
        exchange.check_length()

    async def _tell(self, error: Exception, exchange: _Exchange) -> None:
        if exchange.has_left:
            exchange.status = LEFT
            return
        found = api_error(error)
        if found.status >= 500 and not isinstance(error, ApiError):
            self._metrics.log_failure(exchange.id, error)
        if exchange.has_started:
            # Nothing can be said any more; a connection that breaks is no answer that looks whole.
            raise error
        await exchange.answer(found)

    def _log(self, exchange: _Exchange) -> None:
        scope = exchange.scope
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, exchange.status)
        logger.info(
            '%s "%s %s" %d %.3f s %s',
            log_text((scope.get("client") or ("-",))[0], 45),
            log_text(scope["method"], 16),
            log_text(scope["path"]),
            exchange.status,
            time.monotonic() - exchange.began,
            exchange.id,
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits):
        self.scope, self._receive, self._send, self._limits = scope, receive, send, limits
        # The client's own id is no key of ours: another client might use the same.
        self.id = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = self.id
        self.began = time.monotonic()
        self.status, self.has_started, self.has_left = 500, False, False
        self._received, self._is_body_complete = 0, False

    def check_length(self) -> None:
        """Refuses what says itself to be too long. Raises ApiError."""
        for name, value in self.scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value) > self._limits.body_bytes):
                raise _too_large(self._limits)

    async def receive(self) -> Message:
        """As ASGI's; the body in time, and not more of it than may be."""
        if self._is_body_complete:
            message = await self._receive()
        else:
            message = await self._part_of_body()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message

    async def _part_of_body(self) -> Message:
        limits = self._limits
        ends = self.began + limits.body_seconds + self._received / limits.body_bytes_per_second
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time", code="timeout") from error
        self._received += len(message.get("body", b""))
        if self._received > limits.body_bytes:
            raise _too_large(limits)
        self._is_body_complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's; a client that does not read is left. Raises ClientLeftError."""
        if message["type"] == "http.response.start":
            self.has_started, self.status = True, message["status"]
            self._add_headers(message)
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            self.has_left = True
            raise ClientLeftError from error

    def _add_headers(self, message: MutableMapping[str, Any]) -> None:
        more = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
        headers = list(message.get("headers", ()))
        if self._has_unread_body and b"connection" not in dict(headers):
            # What is left of the body is not waited for: it might never come.
            more.append((b"connection", b"close"))
        message["headers"] = [*headers, *more]

    @property
    def _has_unread_body(self) -> bool:
        headers = dict(self.scope["headers"])
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        return has_body and not self._is_body_complete

    async def _skip_body(self) -> None:
        """Reads a short rest of a body: a connection that closes on unread bytes may lose the answer."""
        if b"expect" in dict(self.scope["headers"]):
            return
        skipped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(SKIPPED_SECONDS):
                while self._has_unread_body and skipped < SKIPPED_BYTES:
                    message = await self._receive()
                    skipped += len(message.get("body", b""))
                    self._is_body_complete = not message.get("more_body", False)

    async def answer(self, error: ApiError) -> None:
        """An error, as OpenAI's clients read it."""
        body = json.dumps(error.body(self.id)).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
        await self._skip_body()
        named = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": named})
        await self.send({"type": "http.response.body", "body": body})


def _too_large(limits: Limits) -> ApiError:
    return _ending(413, f"the body is longer than {limits.body_bytes} bytes", "request_too_large")


def _ending(status: int, message: str, code: str = "invalid_http") -> ApiError:
    """An answer after which nothing more is read from the connection."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})
