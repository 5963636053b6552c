"""What the server asks of an engine; `engine.ServingEngine` is the one that computes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Event
from mm_interleaved.generation.settings import GenerationSettings


class Usage(Protocol):
    """What one document has taken so far."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def reused_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def images(self) -> int: ...


class Ticket(Protocol):
    """One document while it is continued; its events, in order."""

    @property
    def usage(self) -> Usage: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def cancel(self) -> None:
        """Frees its place; nothing happens where it has ended."""
        ...


class Prefixes(Protocol):
    """What was remembered of documents that begin alike."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Statistics(Protocol):
    """Counts since the engine was made; what waits and runs is as of now."""

    @property
    def queued(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def finished(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def aborted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def prefixes(self) -> Prefixes: ...
    @property
    def batch_sizes(self) -> Mapping[str, Mapping[int, int]]: ...


class Engine(Protocol):
    """Continues documents side by side."""

    @property
    def healthy(self) -> bool: ...

    def start(self) -> None: ...

    async def open(
        self, document: Document, settings: GenerationSettings, *, preview_every: int = 0
    ) -> Ticket:
        """Raises what is wrong with the document or its settings, or an error with the code `queue_full` or
        `draining` that says in `retry_after` when to come back.
        """
        ...

    def statistics(self) -> Statistics: ...

    async def drain(self, grace: float) -> None: ...

    def close(self) -> None: ...
