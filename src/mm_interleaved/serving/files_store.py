"""Generated images at short addresses that expire: what Markdown and `response_format: url` point at.

In memory, bounded; an address is 128 random bits, so who knows it may see it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mm_interleaved.serving.settings import Limits

NAME = r"[0-9a-f]{32}"
_ADDRESS = re.compile(rf"^https?://[^\s/]+(?:/[^\s?#]*)?/files/({NAME})\.png$")


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    expires: float


class FilesStore:
    """Images by their name.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._most, self._seconds, self._clock = limits.files_bytes, limits.file_seconds, clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._held = 0

    @property
    def held_bytes(self) -> int:
        """Of all images that are kept."""
        return self._held

    def add(self, content: bytes) -> str:
        """The name of a PNG file from now on; the oldest ones make room."""
        self._drop_expired()
        while self._files and self._held + len(content) > self._most:
            self._drop(next(iter(self._files)))
        name = secrets.token_hex(16)
        self._files[name] = _File(content, self._clock() + self._seconds)
        self._held += len(content)
        return name

    def get(self, name: str) -> bytes | None:
        """The file of that name; None where there is none, or none any more."""
        self._drop_expired()
        found = self._files.get(name)
        return None if found is None else found.content

    def named_by(self, address: str) -> bytes | None:
        """The file that an address of ours names; None for every other address. Nothing is fetched."""
        match = _ADDRESS.match(address)
        return None if match is None else self.get(match[1])

    def _drop_expired(self) -> None:
        # All live equally long: the first ones go first.
        now = self._clock()
        while self._files and next(iter(self._files.values())).expires <= now:
            self._drop(next(iter(self._files)))

    def _drop(self, name: str) -> None:
        self._held -= len(self._files.pop(name).content)
