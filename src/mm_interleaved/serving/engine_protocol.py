"""What the server asks of an engine; `engine.ServingEngine` is the one that computes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Event
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.serving.engine_statistics import EngineStatistics

if TYPE_CHECKING:
    # Its module imports torch, which the server around the engine does without.
    from mm_interleaved.generation.continuation import Usage


class Ticket(Protocol):
    """One document while it is continued; its events, in order."""

    @property
    def usage(self) -> Usage: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def cancel(self) -> None:
        """Frees its place; nothing happens where it has ended."""
        ...


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

    def statistics(self) -> EngineStatistics: ...

    async def drain(self, grace: float) -> None: ...

    def close(self) -> None: ...
