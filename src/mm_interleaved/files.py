"""Files that are whole or absent: atomic writes, appended lines, a folder that one process holds.

Every function turns a failing disk into StorageError and leaves what was there before. What a killed process
was writing has a name that begins with `.tmp-` and its number; the kernel's lock on it shows whether its
writer lives, so that it can be removed by whoever writes there next.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO

from mm_interleaved.errors import StorageError, UsageError

LOCK_NAME = ".lock"
_TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(r"\.tmp-\d+-.+", re.DOTALL)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_held_locks: set[int] = set()
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def write_file(path: Path, data: bytes):
    """Put `data` at `path`, all of it or nothing."""
    with _whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Generator[IO[bytes], None, None]:
    """A file that is whole or not there: what is written to the one that is yielded takes its place at the
    end, under a temporary name first, synced, then renamed over what was there. What killed writers of the
    same file left is removed.
    """
    remove_leftovers_of(path)
    with _whole_file(path) as file:
        yield file


@contextmanager
def _whole_file(path: Path) -> Generator[IO[bytes], None, None]:
    with storage_errors(path), _temporary_of(path, lambda temporary: temporary.touch()) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def append_line(path: Path, line: bytes):
    """Add one line (given without its end) to a file, all of it or nothing.

    A process killed in between leaves a torn tail: see `repair_tail`.
    """
    assert b"\n" not in line
    with storage_errors(path):
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
    if not os.path.lexists(path):
        return 0
    with storage_errors(path, "read"):
        data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    tail = data[len(kept) :]
    if not tail:
        return 0
    try:
        json.loads(tail.decode("utf-8"))
    except (ValueError, RecursionError):
        write_file(path, kept)
        return len(tail)
    write_file(path, data + b"\n")
    return 0


def make_folder(path: Path):
    """The folder, with its parents, if it is not there yet."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def new_folder(path: Path) -> Generator[Path, None, None]:
    """A folder that is whole or not there: fill the one that is yielded; it takes its place when all is
    written. What killed writers of the same folder left is removed.

    Raises:
        UsageError: something other than an empty folder is there already.
        StorageError: the disk failed or is full.
    """
    path = path.absolute()
    with storage_errors(path):
        # Not Path.exists, which raises where a name is too long or a folder is closed to us.
        is_taken = os.listdir(path) if os.path.isdir(path) else os.path.lexists(path)
    if is_taken:
        raise UsageError(f"{path}: is there already, expected a new or an empty folder")
    make_folder(path.parent)
    remove_leftovers_of(path)
    try:
        with _temporary_of(path, _make_anew) as temporary:
            yield temporary
            with storage_errors(path):
                for file in sorted(temporary.rglob("*")):
                    _sync_file(file) if file.is_file() else _sync_folder(file)
                _sync_folder(temporary)
                os.replace(temporary, path)
                _sync_folder(path.parent)
    except Exception as error:
        reason = disk_failure(error)
        if reason is not None and not isinstance(error, StorageError):
            raise StorageError(f"{path}: cannot be written ({reason})") from error
        raise


def remove_folder(path: Path):
    """Delete a folder, if it is there, such that nobody takes a half-deleted one for whole."""
    if not os.path.lexists(path):
        return
    doomed = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    with storage_errors(path):
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
    remove_any(doomed)


def put_aside(path: Path) -> Path:
    """Rename something that is not what it should be to its `spare_name`, which is returned."""
    aside = spare_name(path)
    with storage_errors(path, "moved aside"):
        os.rename(path, aside)
    return aside


def spare_name(path: Path) -> Path:
    """A free name for what is not what `path` should be: `damaged-NAME`, `damaged-2-NAME` and so on beside
    it, so that nothing is overwritten.
    """
    names = chain(["damaged-"], (f"damaged-{number}-" for number in count(2)))
    return next(spare for name in names if not os.path.lexists(spare := path.with_name(f"{name}{path.name}")))


def remove_temporary_files(folder: Path):
    """Delete what killed writers left in `folder`, which is ours, and in its subfolders."""
    for place, folders, files in os.walk(folder):
        _remove_stale(Path(place, name) for name in (*folders, *files) if _TEMPORARY_NAME.fullmatch(name))


def remove_leftovers_of(path: Path):
    """Delete what killed writers of `path` left beside it."""
    pattern = re.compile(rf"\.tmp-\d+-{re.escape(path.name)}")
    with suppress(OSError):
        _remove_stale(path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name))


def _remove_stale(paths: Iterable[Path]):
    for path in paths:
        with suppress(OSError):
            # Not through a link; and a pipe that somebody put there must not make us wait.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):
                    remove_any(path)
            finally:
                os.close(descriptor)


def remove_any(path: Path):
    """Delete a file or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _temporary_of(path: Path, make: Callable[[Path], object]) -> Generator[Path, None, None]:
    """What is written before it takes the place of `path`. Within, whoever looks for leftovers sees that its
    writer lives; behind, it is gone.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    descriptor = None
    try:
        while descriptor is None:
            make(temporary)
            descriptor = _hold(temporary)
        yield temporary
    finally:
        if os.path.lexists(temporary):
            remove_any(temporary)
        if descriptor is not None:
            _let_go(descriptor)


def _hold(path: Path) -> int | None:
    """An open file or folder with the kernel's lock on it; None where somebody took it for a leftover and
    removed it in the meantime.
    """
    descriptor = os.open(path, os.O_RDONLY)
    _lock(descriptor, waits=True)
    if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        _held_locks.add(descriptor)
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int, *, waits: bool = False) -> bool:
    """Take the kernel's lock on an open file or folder; False where somebody has it, or there is none."""
    import fcntl  # POSIX only, like the signals the command line relies on

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _make_anew(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@contextmanager
def locked_folder(folder: Path) -> Generator[None, None, None]:
    """Hold a folder for this process; a second process is refused, with the name of who holds it.

    The kernel drops the lock when its holder dies, however it dies, so a stale lock cannot be left behind.

    Raises:
        UsageError: another process holds it.
        StorageError: the disk failed or is full, or has no locks.
    """
    import fcntl  # POSIX only, like the signals the command line relies on

    path = folder / LOCK_NAME
    with storage_errors(path):
        # A link would let us empty a file of somebody else's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _held_locks.add(descriptor)
    try:
        with storage_errors(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise UsageError(
                    f"{folder}: in use by {holder}; wait for it or choose another folder"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        # The file stays: removing it would let two processes hold two different files of the same name.
        _let_go(descriptor)


def forget_locks():
    """Lets go of the locks of the process that this one was forked from, which keeps them. Otherwise a folder
    would stay locked after that process is killed, until this one has noticed.
    """
    while _held_locks:
        os.close(_held_locks.pop())


def disk_failure(error: BaseException) -> str | None:
    """Why the disk refused, in its own words; None where an error is of another kind.

    Writers in Rust (safetensors, tokenizers) raise classes of their own, whose messages hold the number.
    """
    if isinstance(error, StorageError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK_FAILURES else None
    number = _RUST_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number and int(number[1]) in _DISK_FAILURES else None


@contextmanager
def storage_errors(path: Path, done: str = "written") -> Generator[None, None, None]:
    """Within, what the file system refuses is a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be {done} ({error.strerror or error})") from error


def is_regular_file(path: Path) -> bool:
    """A file that stands here itself: no link, folder, pipe or device."""
    return _mode_is(path, stat.S_ISREG)


def is_real_folder(path: Path) -> bool:
    """A folder that stands here itself, not a link to one."""
    return _mode_is(path, stat.S_ISDIR)


def _mode_is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(os.lstat(path).st_mode)
    # A name may also be none that a file can have: a null character in it, half a character.
    except (OSError, ValueError):
        return False


def _let_go(descriptor: int):
    # A fork has closed those of its parent, and the number may be another file's there.
    if descriptor in _held_locks:
        _held_locks.discard(descriptor)
        os.close(descriptor)


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
