"""One request on its way: events from the engine's thread to whoever awaits them.

    engine's thread -> Mailbox.put -> (event loop) -> Ticket.__anext__ -> consumer
    consumer leaves -> Ticket.cancel, `async with`, or the garbage collector -> engine's inbox

A consumer that is slow holds nobody up and costs no memory without bound: what waits for it is merged, so
that it is never more than the result of its own request.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from mm_interleaved.generation.continuation import Usage
from mm_interleaved.generation.events import Event, Failed, Finished, ImagePreview, TextDelta


class Mailbox:
    """Events of one request; filled by one thread, emptied in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._is_closed = False

    def put(self, event: Event) -> bool:
        """From the engine's thread; False if nobody can take it any more."""
        with self._lock:
            if self._is_closed:
                return False
            _append(self._events, event)
        return self._wake()

    def close(self) -> None:
        """From any thread: nothing comes any more, and what is there is thrown away."""
        with self._lock:
            self._is_closed = True
            self._events.clear()
        self._wake()

    async def get(self) -> Event | None:
        """The next event; None when it is closed."""
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._is_closed:
                    return None
                self._ready.clear()
            await self._ready.wait()

    def _wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The loop has been closed.
            return False
        return True


def _append(events: deque[Event], event: Event) -> None:
    """Put an event behind others; texts that follow each other become one, of previews the newest stays."""
    last = events[-1] if events else None
    if isinstance(last, TextDelta) and isinstance(event, TextDelta):
        events[-1] = TextDelta(last.text + event.text)
    elif isinstance(last, ImagePreview) and isinstance(event, ImagePreview):
        events[-1] = event
    else:
        events.append(event)


class Ticket:
    """A request that was accepted: an asynchronous iterator of its events, the last `Finished` or `Failed`.

        async with await engine.open(document, settings) as ticket:
            async for event in ticket:
                ...

    Whoever leaves the `async with`, cancels it, or drops it frees its place within one step of the engine.

    Args:
        leave: tells the engine that nobody waits for this request any more; may be called from anywhere.
        settle: tells the engine that the last event was taken.
    """

    def __init__(
        self,
        id: str,
        usage: Usage,
        mailbox: Mailbox,
        *,
        leave: Callable[[], None],
        settle: Callable[[], None],
    ):
        self.id, self.usage = id, usage
        """`id` was made by the engine; `usage` grows while the request is answered."""
        self._mailbox, self._leave, self._settle = mailbox, leave, settle
        self._is_over = False

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Event:
        event = None if self._is_over else await self._mailbox.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Finished | Failed):
            self._is_over = True
            self._settle()
        return event

    async def cancel(self) -> None:
        """Nobody waits for it any more. Its iteration ends, if it has not ended."""
        if not self._is_over:
            self._is_over = True
            self._mailbox.close()
            self._leave()

    async def __aenter__(self) -> "Ticket":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.cancel()

    def __del__(self) -> None:
        # No lock is taken here: the garbage collector may come while somebody holds it.
        if not getattr(self, "_is_over", True):
            self._leave()
