"""A judge behind an OpenAI-compatible URL: `POST {base}/chat/completions` with texts and images as data
URLs.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from mm_interleaved.documents.document import Image, Part
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import StorageError, UsageError, escape

_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_ATTEMPTS = 5
_MAX_REPLY = 2**20


class UrlJudge:
    """Asks a model behind a URL.

    Args:
        base: up to `/v1`, e.g. `http://localhost:8000/v1`.
        model: as the server calls it.
        key: sent as a bearer token; never written anywhere.
        seconds: how long one reply may take.
        wait: seconds before the second attempt at a server that is busy, doubled each time.

    Raises:
        UsageError: a URL of another scheme than http and https.
    """

    def __init__(self, base: str, model: str, key: str = "", *, seconds: float = 120, wait: float = 1.0):
        if not base.startswith(("http://", "https://")):
            raise UsageError(f"judge: found {escape(base)!r}, expected an http or https URL")
        self.url, self.model = base.rstrip("/") + "/chat/completions", model
        self._key, self.seconds, self.wait = key, seconds, wait

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def reply(self, parts: Sequence[Part], attempt: int) -> str:
        """The model's text, greedy at first, then at a rising temperature.

        Raises:
            StorageError: the server cannot be reached, refuses, or replies in another form.
        """
        body = {
            "model": self.model,
            "temperature": 0.0 if attempt == 0 else 0.5,
            "max_tokens": 512,
            "messages": [{"role": "user", "content": [_content(part) for part in parts]}],
        }
        found = self._post(json.dumps(body).encode())
        try:
            text = json.loads(found)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise StorageError(
                f"{self.url}: expected a chat completion, found {escape(str(found[:200]))}"
            ) from error
        return text if isinstance(text, str) else ""

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        for number in range(_ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return _whole_reply(response)
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY or number == _ATTEMPTS - 1:
                    raise StorageError(f"{self.url}: refused with {error.code} ({error.reason})") from error
                pause = _pause(error, self.wait * 2**number)
            except (OSError, http.client.HTTPException) as error:
                if number == _ATTEMPTS - 1:
                    raise StorageError(
                        f"{self.url}: cannot be reached ({escape(str(error)) or type(error).__name__})"
                    ) from error
                pause = self.wait * 2**number
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _whole_reply(response: http.client.HTTPResponse) -> bytes:
    """The body. Raises IncompleteRead where the connection ended before it did, which `read` with a limit
    does not.
    """
    data = response.read(_MAX_REPLY)
    if response.length and len(data) < _MAX_REPLY:
        raise http.client.IncompleteRead(data, response.length)
    return data


def _pause(error: urllib.error.HTTPError, otherwise: float) -> float:
    """Seconds to wait: what the server asks for, at most a minute."""
    asked = error.headers.get("Retry-After", "")
    return min(60.0, float(asked)) if asked.isdecimal() else otherwise


def _content(part: Part) -> dict[str, Any]:
    if isinstance(part, Image):
        data = base64.b64encode(to_png(part.load())).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "text", "text": part.text}
