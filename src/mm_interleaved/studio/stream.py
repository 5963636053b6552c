"""The serving engine as `generation.redo` wants it: a plain iterator of events; any thread may stop it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.serving.engine_protocol import Engine


class StoppedError(Exception):
    """Somebody stopped it; what was finished until then stays."""


class EngineStream:
    """Continues documents with an engine that others use at the same time.

    Each belongs to one thread, which calls it and closes it; `stop` may come from any other.
    """

    def __init__(self, engine: Engine, preview_every: int):
        self._engine, self._preview_every = engine, preview_every
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()

    def __call__(self, document: Document, settings: GenerationSettings) -> Iterator[Event]:
        """The events of one continuation, `Finished` at the end.

        Raises:
            StoppedError: after `stop`.
            MMInterleavedError: the engine refuses it, or it fails.
        """
        run = self._loop.run_until_complete
        ticket = run(self._engine.open(document, settings, preview_every=self._preview_every))
        try:
            events = aiter(ticket)
            while True:
                event = run(self._next(events))
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            run(ticket.cancel())

    def stop(self) -> None:
        """From any thread: nobody waits for it any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """When nothing is read from it any more."""
        self._loop.close()

    async def _next(self, events: AsyncIterator[Event]) -> Event:
        """The next event, or the end as soon as somebody wants it."""
        coming = asyncio.ensure_future(_first_of(events))
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((coming, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not self._stopped.is_set():
            return coming.result()
        coming.cancel()
        await asyncio.wait((coming,))
        raise StoppedError


async def _first_of(events: AsyncIterator[Event]) -> Event:
    try:
        return await anext(events)
    except StopAsyncIteration:
        # A task cannot end with this exception.
        raise StoppedError from None
