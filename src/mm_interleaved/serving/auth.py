"""Who may ask: keys, compared in constant time, and the names by which the server may be called."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mm_interleaved.errors import escape
from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.settings import ServerSettings

OPEN_PATHS = ("/health", "/ready")
"""What load balancers ask without a key; they say nothing of anybody's."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Auth:
    """An ASGI application around another one; it looks at every path, known or not."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, files: FilesStore):
        self._app, self._files = app, files
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers)
            if self._keys and scope["path"] not in OPEN_PATHS and not self._is_own_file(scope["path"]):
                self._check_key(headers)
        elif scope["type"] != "lifespan":
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A web page of any name may resolve to this machine, and then it is no other origin: refused."""
        if not self._hosts:
            return
        host = headers.get("host", "").lower()
        name = host if host in self._hosts else host.rpartition(":")[0]
        if name not in self._hosts:
            raise ApiError(403, f"Host: found {escape(host)!r}, which this server does not go by")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All of them, always: time tells nothing of which or how much was right.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "expected an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_own_file(self, path: str) -> bool:
        """An image's address is its own key: browsers ask for images without any."""
        return path.startswith("/files/") and self._files.named_by(f"http://host{path}") is not None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
