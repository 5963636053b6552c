"""Files that are whole or absent: atomic writes, appended lines, a folder that one process holds.

Every function turns a failing disk into StorageError and leaves what was there before.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mm_interleaved.errors import StorageError, UsageError

LOCK_NAME = ".lock"
_TEMPORARY = ".tmp-"
_held_locks: set[int] = set()
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def write_file(path: Path, data: bytes):
    """Put `data` at `path`, all of it or nothing."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is whole or not there: what is written to the one that is yielded takes its place at the
    end, under a temporary name first, synced, then renamed over what was there.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    with _storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def append_line(path: Path, line: bytes):
    """Add one line (given without its end) to a file, all of it or nothing.

    A process killed in between leaves a torn tail: see `repair_tail`.
    """
    assert b"\n" not in line
    with _storage_errors(path):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            length = os.fstat(descriptor).st_size
            try:
                rest = memoryview(line + b"\n")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, length)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(path.parent)


def repair_tail(path: Path) -> int:
    """Cut what stands after the last line end of a file of lines; returns the number of bytes cut.

    A last line that is whole JSON and lacks only its end is kept and ended.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    tail = data[len(kept) :]
    if not tail:
        return 0
    try:
        json.loads(tail.decode("utf-8"))
    except ValueError:
        write_file(path, kept)
        return len(tail)
    write_file(path, data + b"\n")
    return 0


def make_folder(path: Path):
    """The folder, with its parents, if it is not there yet."""
    with _storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is whole or not there: fill the one that is yielded; it takes its place when all is
    written.

    Raises:
        UsageError: something other than an empty folder is there already.
        StorageError: the disk failed or is full.
    """
    path = path.absolute()
    with _storage_errors(path):
        # Not Path.exists, which raises where a name is too long or a folder is closed to us.
        is_taken = os.listdir(path) if os.path.isdir(path) else os.path.exists(path)
    if is_taken:
        raise UsageError(f"{path}: is there already, expected a new or an empty folder")
    make_folder(path.parent)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with _storage_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        yield temporary
        with _storage_errors(path):
            for file in sorted(temporary.rglob("*")):
                _sync_file(file) if file.is_file() else _sync_folder(file)
            _sync_folder(temporary)
            os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK_FAILURES:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    _sync_folder(path.parent)


def remove_temporary_files(folder: Path):
    """Delete what interrupted writes left behind, in `folder` and its subfolders."""
    with _storage_errors(folder):
        for path in folder.rglob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second process is refused and told who holds it.

    The kernel drops the lock when its holder dies, however it dies, so a stale lock cannot be left behind.
    """
    import fcntl  # POSIX only, like the signals the command line relies on

    path = folder / LOCK_NAME
    with _storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise UsageError(f"{folder}: in use by {holder}; wait for it or choose another folder") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held_locks.add(descriptor)
        yield
    finally:
        _held_locks.discard(descriptor)
        # The file stays: removing it would let two processes hold two different files of the same name.
        os.close(descriptor)


def forget_locks():
    """Lets go of the locks of the process that this one was forked from, which keeps them. Otherwise a folder
    would stay locked after that process is killed, until this one has noticed.
    """
    while _held_locks:
        os.close(_held_locks.pop())


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error


def _sync_file(path: Path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path):
    # A rename is on the disk only once its folder is. Windows cannot open folders and sees to it itself.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
