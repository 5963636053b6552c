"""The sessions of a studio: a folder with one folder each, of which those in use are open in memory.

Shelf.open(name) -> Desk(session, revision) -> keep(session): on disk first, then shown
"""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.documents.images import MAX_FILE_BYTES
from mm_interleaved.documents.record_files import MAX_RECORD_BYTES
from mm_interleaved.documents.session import Session
from mm_interleaved.documents.session_files import SESSION, SessionFolder
from mm_interleaved.errors import InputError, escape
from mm_interleaved.files import (
    is_real_folder,
    is_regular_file,
    make_folder,
    new_folder,
    spare_name,
    write_file,
)
from mm_interleaved.studio.actions import new_session, title_of

if TYPE_CHECKING:
    from mm_interleaved.studio.job import Job

MAX_NAME = 100
MAX_OPEN = 256
"""Sessions in memory; of more, those that were not used for longest are read again when they are wanted."""
MAX_UNSAVED = 1000
MAX_ENTRIES = 10_000
"""Files in an archive of a session."""


class Desk:
    """One session that is open.

    Attributes:
        revision: grows with every change; who asks for a change says which one it saw.
        job: what the model is doing for it, or None.
        lock: held while it changes.
    """

    def __init__(self, name: str, folder: Path, session: Session):
        self.name, self.session, self.losses = name, session, session.losses
        self.revision = secrets.randbelow(2**31)
        self.job: Job | None = None
        self.lock = asyncio.Lock()
        self._folder = SessionFolder(folder)

    def keep(self, session: Session) -> None:
        """Show a session from now on, once it is on disk.

        Raises ImageError, StorageError: then everything is as it was.
        """
        self.write(session)
        self.session = session
        self.revision += 1

    def write(self, session: Session) -> None:
        """Put a state on disk that is not shown yet. One that holds nothing is not written."""
        if not session.tree.nodes:
            return
        path = self._folder.path / SESSION
        if self.losses and is_regular_file(path):
            # What could not be read may be worth something to somebody.
            shutil.copyfile(path, spare_name(path))
            self.losses = ()
        self._folder.save(session.head, session.tree)


class Shelf:
    """All sessions below a folder, which belongs to this process."""

    def __init__(self, folder: Path):
        make_folder(folder)
        self.folder = folder
        self._open: dict[str, Desk] = {}

    def new(self) -> Desk:
        """A session without parts; it is on disk from its first one on."""
        name = f"{time.strftime('%Y-%m-%d')}-{secrets.token_hex(5)}"
        return self._opened(name, new_session(name))

    def open(self, name: str) -> Desk:
        """The session of a name. What is damaged is left out, and said (`Desk.losses`).

        Raises InputError: there is none, or nothing in it is whole.
        """
        desk = self._open.pop(name, None)
        if desk is None:
            path = self.folder / name
            if not _is_name(name) or not is_real_folder(path) or not is_regular_file(path / SESSION):
                raise InputError(f"there is no session {escape(repr(name))}", field="session")
            return self._opened(name, Session.load(path))
        # The last one used stands last.
        self._open[name] = desk
        return desk

    def list(self) -> list[Mapping[str, Any]]:
        """What is there, the newest first: `name` and `changed`, seconds since 1970."""
        found: dict[str, float] = {}
        for entry in os.scandir(self.folder):
            file = Path(entry.path, SESSION)
            if _is_name(entry.name) and entry.is_dir(follow_symlinks=False) and is_regular_file(file):
                found[entry.name] = file.stat().st_mtime
        return [
            {"name": name, "changed": changed, "title": self._title(name)}
            for name, changed in sorted(found.items(), key=lambda item: -item[1])
        ]

    def busy(self) -> list[Desk]:
        """Those that the model is at work on."""
        return [desk for desk in self._open.values() if desk.job is not None]

    def take_in(self, data: bytes) -> Desk:
        """A session out of an archive (`session.zip`): its `session.json` and the images beside it, nothing
        else, whatever names it holds.

        Raises:
            InputError: no archive, none of a session, too large, or nothing in it is whole.
            StorageError: the disk is full.
        """
        files = _archived(data)
        name = f"{time.strftime('%Y-%m-%d')}-{secrets.token_hex(5)}"
        with new_folder(self.folder / name) as folder:
            make_folder(folder / "images")
            for path, content in files.items():
                write_file(folder / path, content)
            Session.load(folder)
        return self.open(name)

    def _opened(self, name: str, session: Session) -> Desk:
        desk = self._open[name] = Desk(name, self.folder / name, session)
        idle = [key for key, each in self._open.items() if each.job is None and each.session.tree.nodes]
        for key in idle[: max(0, len(self._open) - MAX_OPEN)]:
            del self._open[key]
        unsaved = [key for key, each in self._open.items() if each.job is None]
        for key in unsaved[: max(0, len(self._open) - MAX_UNSAVED)]:
            del self._open[key]
        return desk

    def _title(self, name: str) -> str:
        desk = self._open.get(name)
        return title_of(desk.session) if desk is not None else _saved_title(self.folder / name / SESSION)


def _is_name(name: str) -> bool:
    is_plain = not set(name) & set("/\\\0") and not name.startswith(".")
    return is_plain and 0 < len(name) <= MAX_NAME


def _saved_title(path: Path) -> str:
    """The title in a session's file: its head stands in the first lines, the parts are not read."""
    from mm_interleaved.documents.strict_json import parse_strict

    try:
        with path.open("rb") as file:
            for line in file.read(64 * 2**10).splitlines()[:8]:
                if line.startswith(b'"meta": '):
                    meta = parse_strict(line[8:].decode("utf-8").rstrip(", \n"), "meta")
                    return str(meta.get("title", ""))[:MAX_NAME] if isinstance(meta, dict) else ""
    except (OSError, UnicodeDecodeError, InputError):
        pass
    return ""


def _archived(data: bytes) -> dict[str, bytes]:
    """The files of a session by their paths beside `session.json`. Raises InputError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise InputError(f"the archive holds {len(entries)} files, expected at most {MAX_ENTRIES}")
            session = [each for each in entries if each.filename.rpartition("/")[2] == SESSION]
            if len(session) != 1:
                raise InputError(f"the archive holds {len(session)} files {SESSION}, expected one")
            root = session[0].filename.removesuffix(SESSION)
            found = {SESSION: _read(archive, session[0], MAX_RECORD_BYTES)}
            left = 16 * MAX_FILE_BYTES
            for entry in entries:
                folder, _, name = entry.filename.removeprefix(root).rpartition("/")
                if folder == "images" and entry.filename.startswith(root) and _is_name(name):
                    found[f"images/{name}"] = content = _read(archive, entry, min(left, MAX_FILE_BYTES))
                    left -= len(content)
            return found
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"no archive of a session ({escape(str(error))})") from error


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """What an archive holds, read no further than it may be long, whatever it says of itself."""
    with archive.open(entry) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{escape(entry.filename)}: is longer than {most} bytes")
    return content
