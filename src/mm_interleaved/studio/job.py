"""Lanes on their way: the engine's events as messages for the page, and as a session at the end.

lanes -> a thread each -> messages (text, preview, image ...) -> the page
                       -> parts that are whole -> the session, saved while it grows
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import MMInterleavedError
from mm_interleaved.generation.events import (
    Event,
    Finished,
    ImageDone,
    ImagePreview,
    ImageStarted,
    TextDelta,
)
from mm_interleaved.generation.redo import KEEP, stream_again
from mm_interleaved.serving.engine_protocol import Engine
from mm_interleaved.studio.actions import as_one_step
from mm_interleaved.studio.asks import Lane
from mm_interleaved.studio.pictures import data_url
from mm_interleaved.studio.stream import EngineStream, StoppedError
from mm_interleaved.tokens.processor import MMInterleavedProcessor

logger = logging.getLogger(__name__)

PREVIEWS = 8
"""Of an image, at most about so many."""
Message: TypeAlias = dict[str, Any]
_FAILED = "something went wrong inside; the log of the studio has more"


@dataclass(slots=True)
class _Progress:
    """What a lane has made so far."""

    lane: Lane
    stream: EngineStream
    parts: list[Part] = field(default_factory=list)
    text: str = ""
    """Of the part that is being written."""
    finished: Document | None = None
    reason: str = ""
    error: str = ""

    @property
    def place(self) -> int:
        """Where the part that is being made stands."""
        return self.lane.start + len(self.parts)

    def end_text(self) -> None:
        if self.text:
            self.parts.append(Text(self.text, generated=True))
            self.text = ""

    def document(self) -> Document | None:
        """The document as far as it is made; None where there is nothing new to show."""
        if self.finished is not None:
            return self.finished
        keeps = self.lane.part is not None and self.lane.rest == KEEP
        if keeps or not self.parts:
            return None
        return self.lane.document.branched(self.lane.start).extended(*self.parts)


class Job:
    """One thing that the model was asked for in one session.

    Args:
        base: the session as it was asked.
        save: keeps a session, whole or not at all; called in a thread of its own.
        context_length: tokens that the model takes.
    """

    def __init__(
        self,
        engine: Engine,
        processor: MMInterleavedProcessor,
        context_length: int,
        base: Session,
        lanes: Sequence[Lane],
        save: Callable[[Session], None],
    ):
        self._processor, self._context_length, self._save = processor, context_length, save
        self.base = base
        self._running = [
            _Progress(lane, EngineStream(engine, max(1, lane.settings.num_inference_steps // PREVIEWS)))
            for lane in lanes
        ]
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._left = len(self._running)
        self._over = asyncio.Event()
        self.is_kept = asyncio.Event()
        """Set by whoever has kept its session."""

    def start(self) -> None:
        """Begin, a thread for each lane."""
        for number, each in enumerate(self._running):
            threading.Thread(target=self._run, args=(number, each), name="studio-lane", daemon=True).start()

    def stop(self) -> None:
        """What is finished stays. May be called twice."""
        for each in self._running:
            each.stream.stop()

    async def wait(self, seconds: float = 10.0) -> None:
        """Stops it, and returns when what is finished is kept, or after so many seconds."""
        self.stop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.is_kept.wait(), seconds)

    async def messages(self) -> AsyncGenerator[Message, None]:
        """What happens, for the page, until all lanes have ended."""
        while (message := await self._messages.get()) is not None:
            if message["type"] in ("image", "start image") and len(self._running) == 1:
                # Whatever happens to this machine: what is whole is on disk.
                await asyncio.to_thread(self._save, self.session())
            yield message

    async def ended(self) -> None:
        """Stops it, and returns when all its threads have."""
        self.stop()
        await self._over.wait()

    def session(self) -> Session:
        """The session with what is made so far, as one step from the one it began with."""
        session = self.base
        documents = [(each, document) for each in self._running if (document := each.document()) is not None]
        for each, document in documents:
            session = session.showing(document, each.lane.given)
        if documents:
            session = session.showing(documents[0][1], documents[0][0].lane.given)
        return as_one_step(self.base, replace(session, head=self.base.head))

    @property
    def reason(self) -> str:
        """Why the first lane ended, see `events.Finished`; "stopped" where it was stopped."""
        return self._running[0].reason

    @property
    def errors(self) -> list[str]:
        """What failed, a sentence each."""
        return list(dict.fromkeys(each.error for each in self._running if each.error))

    # ---- In the thread of a lane -----------------------------------------------------------------

    def _run(self, number: int, progress: _Progress) -> None:
        try:
            for event in self._events(progress):
                for message in _messages_of(event, progress):
                    self._tell({**message, "lane": number})
        except StoppedError:
            progress.end_text()
            progress.reason = "stopped"
        except MMInterleavedError as error:
            progress.error = str(error)
        except Exception:
            logger.exception("a lane of the studio failed")
            progress.error = _FAILED
        finally:
            progress.stream.close()
            self._tell({"type": "lane", "lane": number})
            self._loop.call_soon_threadsafe(self._end_lane)

    def _events(self, progress: _Progress) -> Iterator[Event]:
        lane = progress.lane
        if lane.part is None:
            return progress.stream(lane.document, lane.settings)
        return stream_again(
            progress.stream,
            self._processor,
            self._context_length,
            lane.document,
            lane.part,
            lane.settings,
            lane.rest,
        )

    def _tell(self, message: Message) -> None:
        self._loop.call_soon_threadsafe(self._messages.put_nowait, message)

    def _end_lane(self) -> None:
        self._left -= 1
        if not self._left:
            self._over.set()
            self._messages.put_nowait(None)


def _messages_of(event: Event, progress: _Progress) -> Iterator[Message]:
    """What the page is told of an event; the lane's progress is brought up to date."""
    match event:
        case TextDelta(text=text):
            if not progress.text:
                yield {"type": "start text", "place": progress.place}
            progress.text += text
            yield {"type": "text", "place": progress.place, "text": text}
        case ImageStarted():
            progress.end_text()
            yield {"type": "start image", "place": progress.place}
        case ImagePreview(image=image, step=step):
            steps = progress.lane.settings.num_inference_steps
            yield {
                "type": "preview",
                "place": progress.place,
                "src": data_url(image),
                "step": step,
                "steps": steps,
            }
        case ImageDone(image=image, seed=seed, pixel_error=error):
            place = progress.place
            progress.parts.append(Image(image, generated=True, seed=seed, pixel_error=error))
            yield {"type": "image", "place": place, "src": data_url(image)}
        case Finished(reason=reason, document=document):
            progress.finished, progress.reason = document, reason
        case _:
            pass
