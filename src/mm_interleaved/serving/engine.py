"""The engine of a server: one thread that continues the documents of all requests side by side.

    open(document, settings) -> queue -> ContinuousBatch -> events -> Ticket

It knows no HTTP. Requests that run share passes of the model, and join and leave at any step; those beyond
`max_running` wait, those beyond `max_queue` are refused.
"""

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

import torch

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.generation.batched import ContinuousBatch, Steps
from mm_interleaved.generation.continuation import Continuation
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import Event, Failed, Finished, ImageDone
from mm_interleaved.generation.prefix_store import PrefixStatistics, PrefixStore
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.evaluation_mode import evaluation_mode
from mm_interleaved.serving.engine_statistics import Counts, EngineStatistics
from mm_interleaved.serving.refusals import Draining, QueueFull, told
from mm_interleaved.serving.ticket import Mailbox, Ticket

logger = logging.getLogger(__name__)

LONGEST_RETRY = 60
"""Seconds after which whoever was refused is told to come back at the latest."""


PREFIX_BYTES = 256 * 2**20


@dataclass(slots=True, eq=False)
class _Request:
    id: str
    continuation: Continuation | None
    """None when it is over: its memory is free, whoever still holds the ticket."""
    mailbox: Mailbox
    number: int | None = None
    """In the batch, from when it runs."""
    is_left: bool = False
    begun: float = field(default_factory=time.monotonic)


Message = Callable[[], None]
"""What the engine's thread shall do between two steps."""


class ServingEngine:
    """Continues the documents of many requests with one model.

    Args:
        max_running: requests that are answered at the same time.
        max_queue: requests that wait beyond those.
        prefix_bytes: memory for what was read of finished documents, see `PrefixStore`; 0 is none.
    """

    def __init__(
        self,
        generator: InterleavedGenerator,
        *,
        max_running: int = 8,
        max_queue: int = 64,
        prefix_bytes: int = PREFIX_BYTES,
    ):
        self.generator, self.max_running, self.max_queue = generator, max_running, max_queue
        self._prefixes = PrefixStore(generator.model, prefix_bytes) if prefix_bytes else None
        # Messages may come from the garbage collector: this queue's `put` may interrupt itself.
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._counts = Counts()
        self._sizes = {"encode": Counter[int](), "text": Counter[int](), "image": Counter[int]()}
        self._seconds_each = 1.0
        self._retry_after_drain: float | None = None
        self._thread = threading.Thread(target=self._run, name="serving-engine", daemon=True)
        # What follows belongs to the engine's thread.
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._is_stopping = self._is_stopped = False
        self._batch = self._new_batch()

    # ---- For the event loop ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether its thread is there to answer."""
        return self._thread.is_alive()

    async def open(
        self, document: Document, settings: GenerationSettings, *, preview_every: int = 0
    ) -> Ticket:
        """Accept a request.

        Args:
            settings: see `InterleavedGenerator.stream`.
            preview_every: denoising steps between two previews of an image; 0 is none.

        Raises:
            QueueFull: as many wait as may; `retry_after` says when to come back.
            Draining: the engine is about to stop.
            UsageError: settings that cannot be, or that this model cannot follow.
            InputError: the document cannot be encoded or does not fit into the context.
        """
        self._take_place()
        try:
            continuation = await asyncio.to_thread(
                self.generator.begin,
                document,
                settings,
                preview_every=preview_every,
                prefixes=self._prefixes,
            )
        except BaseException:
            self._count(queued=-1)
            raise
        mailbox = Mailbox(asyncio.get_running_loop())
        request = _Request(f"req-{uuid.uuid4().hex}", continuation, mailbox)
        with self._changed:
            if self._is_stopped:
                self._counts.queued -= 1
                raise Draining("the server is shutting down", 1)
            self._counts.accepted += 1
            self._counts.prompt_tokens += continuation.usage.prompt_tokens
            # Before the thread can stop: it answers all that it finds.
            self._inbox.put(partial(self._waiting.append, request))
        return Ticket(
            request.id,
            continuation.usage,
            mailbox,
            leave=partial(self._inbox.put, partial(self._leave, request)),
            settle=partial(self._count, unread=-1),
        )

    def statistics(self) -> EngineStatistics:
        with self._changed:
            counts = {each.name: getattr(self._counts, each.name) for each in fields(Counts)}
            sizes = {kind: dict(self._sizes[kind] + now) for kind, now in self._batch_sizes().items()}
            counts["text_tokens"] += self._batch.num_tokens
        prefixes = PrefixStatistics() if self._prefixes is None else self._prefixes.statistics
        counts |= {f"prefix_{each.name}": getattr(prefixes, each.name) for each in fields(prefixes)}
        return EngineStatistics(**counts, batch_sizes=sizes)

    async def drain(self, grace: float) -> None:
        """Accept nothing new, finish what was accepted, then stop.

        Args:
            grace: seconds after which what is not finished fails.
        """
        self._retry_after_drain = grace
        await asyncio.to_thread(self._wait_until_idle, grace)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop; what is not finished fails."""
        if self._retry_after_drain is None:
            self._retry_after_drain = 1
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def _take_place(self) -> None:
        with self._changed:
            counts = self._counts
            if self._retry_after_drain is not None or not self.healthy:
                counts.refused += 1
                raise Draining("the server is shutting down", self._retry_after_drain or 1)
            places = self.max_running + self.max_queue
            open_requests = counts.queued + counts.running
            # Answers that nobody takes are kept in memory, so there is an end to them too.
            if open_requests >= places or counts.unread >= 2 * places:
                counts.refused += 1
                seconds = self._seconds_each * open_requests / self.max_running
                raise QueueFull(
                    f"{open_requests} requests are open and {counts.unread} answers not taken, no more than "
                    f"{places} and {2 * places} may be",
                    min(LONGEST_RETRY, seconds),
                )
            counts.queued += 1

    def _wait_until_idle(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._counts.queued + self._counts.running == 0, seconds)

    def _count(self, **changes: int) -> None:
        with self._changed:
            for name, change in changes.items():
                setattr(self._counts, name, getattr(self._counts, name) + change)
            self._changed.notify_all()

    # ---- For the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_messages():
                try:
                    with torch.no_grad(), evaluation_mode(self.generator.model):
                        for number, event in self._batch.step():
                            self._deliver(number, event)
                except Exception as error:
                    logger.exception("a step of the engine failed; what ran then fails")
                    self._begin_anew(error)
        finally:
            self._fail_all()

    def _take_messages(self) -> bool:
        """Does what came in, and fills free places; waits while there is nothing to do. False at the end."""
        while True:
            is_idle = not self._running and not self._waiting
            try:
                self._inbox.get(block=is_idle)()
            except queue.Empty:
                break
            if self._is_stopping:
                return False
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting.popleft()
            request.begun = time.monotonic()
            assert request.continuation is not None
            steps = request.continuation.steps()
            request.number = self._batch.add(_with_any_failure(steps, request.id))
            self._running[request.number] = request
            self._count(queued=-1, running=1)
        return True

    def _deliver(self, number: int, event: Event) -> None:
        request = self._running.get(number)
        if request is None:
            return
        is_over = isinstance(event, Finished | Failed)
        if isinstance(event, ImageDone):
            self._count(images=1)
        if is_over:
            self._end(request, is_failed=isinstance(event, Failed))
        if not request.mailbox.put(event) and not is_over:
            self._leave(request)

    def _end(self, request: _Request, *, is_failed: bool) -> None:
        assert request.number is not None
        del self._running[request.number]
        request.continuation = None
        self._seconds_each += 0.1 * (time.monotonic() - request.begun - self._seconds_each)
        outcome = {"failed": 1} if is_failed else {"finished": 1}
        self._count(running=-1, unread=1, **outcome)

    def _leave(self, request: _Request) -> None:
        """Nobody waits for a request any more."""
        if request.is_left:
            return
        request.is_left = True
        request.mailbox.close()
        request.continuation = None
        if request.number is None:
            if request in self._waiting:
                self._waiting.remove(request)
                self._count(queued=-1, aborted=1)
        elif self._running.pop(request.number, None) is not None:
            self._batch.cancel(request.number)
            self._count(running=-1, aborted=1)
        else:
            # It was answered, but nobody took the answer.
            self._count(unread=-1)

    def _stop(self) -> None:
        self._is_stopping = True

    def _fail_all(self) -> None:
        """The thread ends: nobody may wait for it."""
        with self._changed:
            self._is_stopped = True
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                break
        error = Draining("the server is shutting down", self._retry_after_drain or 1)
        for request in list(self._running.values()):
            self._end(request, is_failed=True)
            request.mailbox.put(Failed(error))
        while self._waiting:
            request = self._waiting.popleft()
            request.continuation = None
            self._count(queued=-1, failed=1, unread=1)
            request.mailbox.put(Failed(error))
        self._batch.close()

    def _begin_anew(self, error: Exception) -> None:
        """After a failure that is not one document's: those that ran fail, and nothing of them is kept."""
        for request in list(self._running.values()):
            self._end(request, is_failed=True)
            request.mailbox.put(Failed(told(error, request.id)))
        with self._changed:
            for kind, sizes in self._batch_sizes().items():
                self._sizes[kind] += sizes
            self._counts.text_tokens += self._batch.num_tokens
            self._batch = self._new_batch()
        if self._prefixes is not None:
            self._prefixes.clear()

    def _new_batch(self) -> ContinuousBatch:
        return ContinuousBatch(self.generator.assistant_model)

    def _batch_sizes(self) -> dict[str, Counter[int]]:
        batch = self._batch
        sizes = {"encode": batch.encoded_sizes, "text": batch.texts.sizes, "image": batch.images.sizes}
        # The engine's thread may count on meanwhile: `dict` copies in one go, adding counters does not.
        return {kind: Counter(dict(counter)) for kind, counter in sizes.items()}


def _with_any_failure(steps: Steps, id: str) -> Steps:
    """A document's steps; whatever they raise is their last event."""
    try:
        yield from steps
    except MMInterleavedError as error:
        yield Failed(error)
    except Exception as error:
        logger.exception("request %s failed", id)
        yield Failed(told(error, id))
