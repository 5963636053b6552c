"""Everything between the web and the model: which session changes how, and what is told of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.images import upright_size
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import InputError, MMInterleavedError, UsageError, escape
from mm_interleaved.runs.explanation import explanation_page
from mm_interleaved.serving.engine_protocol import Engine
from mm_interleaved.serving.files_store import FilesStore
from mm_interleaved.serving.settings import Limits
from mm_interleaved.studio.actions import apply, title_of
from mm_interleaved.studio.asks import check_limits, lanes
from mm_interleaved.studio.exports import Export, export
from mm_interleaved.studio.job import Job, Message
from mm_interleaved.studio.pictures import Pictures
from mm_interleaved.studio.settings_form import settings_form
from mm_interleaved.studio.shelf import Desk, Shelf
from mm_interleaved.studio.view import session_view
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.versions import __version__

if TYPE_CHECKING:
    from mm_interleaved.generation.explanation import Explanation

MAX_PARTS = 500
"""Of one document."""


class StaleError(MMInterleavedError):
    """Another tab has changed the session since, or the model is at work on it."""

    code = "stale"


class Model:
    """What the studio knows of the model.

    Args:
        name: as a person calls it.
        defaults: its own generation settings.
        image_size: height and width of its images; 0 and 0 where it makes none.
        context_length: tokens that it takes.
        explain: what it looked at in a document; None where nobody can tell. It may take a while.
    """

    def __init__(
        self,
        name: str,
        processor: MMInterleavedProcessor,
        defaults: Mapping[str, Any],
        image_size: tuple[int, int],
        context_length: int,
        explain: Callable[[Document], Explanation] | None = None,
    ):
        self.name, self.processor, self.defaults = name, processor, defaults
        self.image_size, self.context_length = image_size, context_length
        self.explain = explain

    def record(self) -> dict[str, Any]:
        """What the page needs of it."""
        form = settings_form(self.defaults, has_images=any(self.image_size))
        return {
            "name": self.name,
            "version": __version__,
            "images": any(self.image_size),
            "form": form,
            "explains": self.explain is not None,
        }


class Studio:
    """All sessions of a folder, one engine."""

    def __init__(self, engine: Engine, model: Model, folder: Path, limits: Limits):
        self.engine, self.model, self.limits = engine, model, limits
        self.shelf = Shelf(folder)
        self._uploads = FilesStore(limits)
        self._pictures = Pictures()
        # One at a time: each denoises all pictures of a document again.
        self._explaining = threading.Lock()

    # ---- Looking ---------------------------------------------------------------------------------

    def view(self, desk: Desk, session: Session | None = None) -> dict[str, Any]:
        """A session as the page shows it. Raises ImageError where an image is gone."""
        shown = desk.session if session is None else session

        def address(node: int, image: Image) -> str:
            return f"pictures/{quote(desk.name, safe='')}/{node}.png?{self._pictures.png(image)[1]}"

        return {
            "session": desk.name,
            "revision": desk.revision,
            "busy": desk.job is not None,
            "losses": list(desk.losses),
            **session_view(shown, address),
        }

    def picture(self, name: str, node: int) -> bytes:
        """The image of a node as a PNG file. Raises InputError where there is none."""
        desk = self.shelf.open(name)
        nodes = desk.session.tree.nodes
        part = nodes[node].part if 0 <= node < len(nodes) else None
        if not isinstance(part, Image):
            raise InputError("there is no such picture")
        return self._pictures.png(part)[0]

    def export(self, name: str, form: str) -> Export:
        """A session as a file."""
        return export(self.shelf.open(name).session, form, self.model.name)

    def looked(self, name: str) -> bytes:
        """A page that shows what the model looked at, where one points at a word or a place of a picture.

        Raises UsageError: nothing is there to look at, or the model has nothing to look with.
        """
        session = self.shelf.open(name).session
        document = session.document
        if self.model.explain is None or not any(part.generated for part in document.parts):
            raise UsageError("there is nothing yet that the model made while it looked at pictures")
        with self._explaining:
            found = self.model.explain(document)
        title = title_of(session) or document.id
        return explanation_page(found, title, f"what {self.model.name} looked at")

    # ---- Changing --------------------------------------------------------------------------------

    def upload(self, data: bytes) -> dict[str, Any]:
        """Keeps an image until an action takes it. Raises ImageError for what the server refuses, too."""
        width, height = upright_size(data, name="the picture")
        image = Image(data)
        # Decoded now: what is damaged is refused where it comes in.
        image.load()
        return {"upload": self._uploads.add(data), "width": width, "height": height}

    async def act(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Does what a person asked for, and keeps it.

        Args:
            asked: `revision`, the one that was seen; `action`; `fields`.

        Raises StaleError, UsageError, InputError, StorageError: nothing has changed then.
        """
        desk = self.shelf.open(name)
        action, fields = asked.get("action"), asked.get("fields")
        if not isinstance(action, str) or not isinstance(fields, Mapping):
            raise UsageError("expected an action with its fields", field="action")
        async with desk.lock:
            _check_revision(desk, asked.get("revision"))
            changed = apply(desk.session, action, self._with_parts(fields))
            self._check_size(changed)
            if changed is not desk.session:
                await asyncio.to_thread(desk.keep, changed)
            return await asyncio.to_thread(self.view, desk)

    async def generate(
        self, name: str, revision: Any, ask: Mapping[str, Any]
    ) -> AsyncGenerator[Message, None]:
        """What the model does for a session, message by message; the last one is `end` and has the view.

        Whoever leaves it stops the model; what is finished by then is kept.
        """
        desk = self.shelf.open(name)
        async with desk.lock:
            _check_revision(desk, revision)
            found = lanes(desk.session, ask, self.model.defaults)
            for lane in found:
                check_limits(lane, self.limits, self.model.image_size)
            self._check_images(desk.session)
            desk.job = job = Job(
                self.engine,
                self.model.processor,
                self.model.context_length,
                desk.session,
                found,
                desk.write,
            )
        job.start()
        try:
            yield {"type": "start", "lanes": len(found), "place": found[0].start, "rest": found[0].rest}
            async for message in job.messages():
                yield message
        finally:
            await asyncio.shield(self._finish(desk, job))
        yield {
            "type": "end",
            "reason": job.reason,
            "errors": job.errors,
            "view": await asyncio.to_thread(self.view, desk),
        }

    def stop(self, name: str) -> None:
        """Ends what the model does for a session; what is finished stays."""
        job = self.shelf.open(name).job
        if job is not None:
            job.stop()

    async def close(self) -> None:
        """Ends what the model does in all sessions, and keeps what is finished."""
        await asyncio.gather(*(desk.job.wait() for desk in self.shelf.busy() if desk.job is not None))

    async def _finish(self, desk: Desk, job: Job) -> None:
        """Keeps what a job made, also where nobody listens any more."""
        try:
            await job.ended()
            done = job.session()
            if done.tree != desk.session.tree:
                await asyncio.to_thread(desk.keep, done)
        finally:
            desk.job = None
            job.is_kept.set()

    # ---- Checks ----------------------------------------------------------------------------------

    def _with_parts(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of an action, with parts in place of what names them."""
        found = dict(fields)
        if isinstance(parts := fields.get("parts"), list):
            found["parts"] = [self._part(part) for part in parts]
        if "image" in fields:
            found["image"] = self._part({"type": "image", "upload": fields["image"]})
        return found

    def _part(self, record: Any) -> Part:
        match record:
            case {"type": "text", "text": str(text)}:
                return Text(_without_surrogates(text))
            case {"type": "image", "upload": str(upload)}:
                data = self._uploads.get(upload)
                if data is None:
                    raise InputError("the picture has waited too long, expected it again", field="upload")
                return Image(data)
            case _:
                raise UsageError(f"parts: found {escape(repr(record))}, expected a text or an image")

    def _check_size(self, session: Session) -> None:
        parts = session.tree.path
        if len(parts) > MAX_PARTS:
            raise UsageError(f"the document has {len(parts)} parts, expected at most {MAX_PARTS}")
        characters = sum(len(part.text) for part in session.document.parts if isinstance(part, Text))
        if characters > self.limits.characters:
            raise UsageError(
                f"the texts have {characters} characters, expected at most {self.limits.characters}"
            )

    def _check_images(self, session: Session) -> None:
        sizes = [upright_size(image.source, name=image.name) for image in session.document.images]
        pixels = sum(width * height for width, height in sizes)
        if pixels > self.limits.pixels:
            raise UsageError(f"the pictures have {pixels} pixels, expected at most {self.limits.pixels}")


def _check_revision(desk: Desk, revision: Any) -> None:
    if desk.job is not None:
        raise StaleError("the model is writing in this session; stop it first, or wait")
    if revision != desk.revision:
        raise StaleError("another tab has changed this session; what it shows now is loaded")


def _without_surrogates(text: str) -> str:
    """Raises UsageError for what is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("text: found half of a surrogate pair, expected a text", field="text") from error
    return text
