"""Where the files of a corpus lie and how they are opened: local paths, globs, braces, fsspec addresses."""

from __future__ import annotations

import glob
import gzip
import itertools
import logging
import os
import re
import stat
import tarfile
import time
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

from mm_interleaved.documents.images import file_kind
from mm_interleaved.documents.record_files import files_inside
from mm_interleaved.errors import InputError, MMInterleavedError, StorageError, UsageError, escape

logger = logging.getLogger(__name__)

MAX_FILES = 1_000_000
_MAX_NAMED = 10
_RETRY_AFTER_S = (0.5, 2.0)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*(?:://|::[a-z/])", re.ASCII | re.IGNORECASE)
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
_LOCAL = ("file", "local")
_ARCHIVES = ("zip://", "tar://", "libarchive://")
_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")


# Names


def is_address(path: str) -> bool:
    """Whether fsspec opens it; `file://` is a local path."""
    return bool(_ADDRESS.match(path)) and not path.lower().startswith("file://")


def folder_of(path: str) -> str:
    """The folder (or the address above) of a file."""
    if not is_address(path):
        return os.path.dirname(path) or "."
    before, scheme, inside, behind = _taken_apart(path)
    return before + scheme + inside.rpartition("/")[0] + behind


def address_below(folder: str, name: str) -> str:
    """The address of a file below an address, in the storage that holds the folder.

    Of chained addresses (`zip://a::file:///b.zip`) that is not the last one, and a name begins no new link.
    """
    before, scheme, inside, behind = _taken_apart(folder)
    return f"{before}{scheme}{inside.rstrip('/')}{'/' if inside else ''}{name}{behind}"


def local_path_of(address: str) -> str | None:
    """Where a file at an address lies on this machine's disk; None where it lies elsewhere."""
    _, scheme, inside, _ = _taken_apart(address)
    return inside if not scheme or scheme.lower() in (f"{name}://" for name in _LOCAL) else None


def _taken_apart(address: str) -> tuple[str, str, str, str]:
    """What stands before the link that holds the path, that link's scheme and path, what stands behind it."""
    links = address.split("::")
    # A cache passes on the path of the link behind it.
    at = next((n for n, link in enumerate(links) if link.lower().split("://")[0] not in _CACHES), 0)
    scheme, slashes, inside = links[at].rpartition("://")
    before, behind = "".join(f"{link}::" for link in links[:at]), "".join(f"::{x}" for x in links[at + 1 :])
    return before, scheme + slashes, inside, behind


def is_hidden(name: str) -> bool:
    """Whether a file is one that other machines leave behind (`._0.jpg`, `__MACOSX/`, `.DS_Store`)."""
    parts = [part for part in name.lower().split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part in _HIDDEN for part in parts)


def name_of(path: str) -> str:
    """The file's name, without its folders."""
    return os.path.basename(_taken_apart(path)[2] if is_address(path) else path)


def stem_of(path: str) -> str:
    """The file's name up to its first dot."""
    return name_of(path).split(".", 1)[0]


def found_files(patterns: str | Sequence[str]) -> list[str]:
    """The files that patterns name, in their order, those of one glob sorted; each once.

    `{00000..00012}` and `{a,b}` are spelt out, `*`, `?` and `**` looked up, here and on other machines.

    Raises:
        UsageError: no pattern, too many names, a program instead of a file.
        InputError: files that are not there or not regular files; all of them are named.
    """
    found: dict[str, None] = {}
    wrong: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        for name in _spelt_out(os.fspath(pattern)):
            files, problem = _looked_up(name)
            found.update(dict.fromkeys(files))
            wrong += [problem] if problem else []
    if wrong:
        more = f" (and {len(wrong) - _MAX_NAMED} more)" if len(wrong) > _MAX_NAMED else ""
        raise InputError("; ".join(wrong[:_MAX_NAMED]) + more)
    if not found:
        raise UsageError("paths: found none, expected at least one file, glob or address", field="paths")
    return list(found)


def _spelt_out(pattern: str) -> list[str]:
    """A pattern with its braces written out."""
    if pattern.lower().startswith("pipe:"):
        raise UsageError(f"{escape(pattern)}: programs are never run, expected a file or an address")
    if pattern.lower().startswith("file://"):
        pattern = pattern[len("file://") :]
    if not is_address(pattern) and os.path.exists(pattern):
        return [pattern]
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    number = 1
    for names in choices:
        number *= len(names)
    if not 0 < number <= MAX_FILES:
        raise UsageError(f"{escape(pattern)}: stands for {number} names, expected 1 to {MAX_FILES}")
    return ["".join(names) for names in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    match = _RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last = match.groups()
    width, count = len(first), int(last) - int(first) + 1
    if count > MAX_FILES:
        raise UsageError(f"{{{inside}}} stands for {count} names, expected 1 to {MAX_FILES}")
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _looked_up(name: str) -> tuple[list[str], str]:
    """The files of one name or glob, and what is wrong with it."""
    if is_address(name):
        system, path = _file_system(name)
        with _reaching(name):
            if _WILD.search(name):
                found_there = (found for found in sorted(system.glob(path)) if not is_hidden(found))
                before, scheme, _, behind = _taken_apart(name)
                is_chained = bool(before or behind)
                files = [
                    f"{before}{scheme}{found}{behind}" if is_chained else system.unstrip_protocol(found)
                    for found in found_there
                ]
                return files, "" if files else f"{escape(name)}: matches no file"
            return [name], "" if system.isfile(path) else f"{escape(name)}: there is no such file"
    if _WILD.search(name) and not os.path.exists(name):
        files = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        wrong = [problem for path in files if (problem := _local_problem(path))]
        return files, "; ".join(wrong) if files else f"{escape(name)}: matches no file"
    return [name], _local_problem(name)


def _local_problem(path: str) -> str:
    """What is wrong with a local file, as far as it shows unopened."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{escape(path)}: there is no such file"
    if not stat.S_ISREG(status.st_mode):
        instead = files_inside(path) if stat.S_ISDIR(status.st_mode) else ""
        return f"{escape(path)}: is a {file_kind(status.st_mode)}, expected a regular file{instead}"
    if not os.access(path, os.R_OK):
        return f"{escape(path)}: there is no permission to read it"
    return "" if status.st_size else f"{escape(path)}: is empty"


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UsageError(f"{escape(address)}: needs fsspec: pip install 'mm-interleaved[train]'") from error
    before, scheme, inside, behind = _taken_apart(address)
    # Some storage is connected to here.
    with _reaching(address):
        try:
            if scheme.lower() in _ARCHIVES:
                return _archive(f"{before}{scheme}{behind}", os.getpid()), inside
            return url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{escape(address)}: cannot be opened ({escape(str(error))})") from error


@lru_cache(maxsize=16)
def _archive(address: str, process: int) -> Any:
    """The contents of an archive. It closes when nobody holds it, whoever still reads one of its files; and
    processes that share an open one would move each other's place in it.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(address)[0]


# Contents


@contextmanager
def reading(path: str) -> Generator[None, None, None]:
    """A failing disk or network becomes a StorageError that names the file."""
    try:
        yield
    except gzip.BadGzipFile:
        # What is wrong is the file.
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"{escape(path)}: cannot be read ({escape(reason)})") from error


@contextmanager
def _reaching(address: str) -> Generator[None, None, None]:
    """Whatever the client of a storage raises names the address: InputError where there is no such file or
    no such archive, else StorageError.
    """
    try:
        yield
    except MMInterleavedError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{escape(address)}: there is no such file") from error
    except (ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{escape(address)}: cannot be read ({escape(str(error))})") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise StorageError(f"{escape(address)}: does not answer ({escape(reason)})") from error


def open_file(path: str) -> IO[bytes]:
    """A file for reading and seeking. An address that does not answer is tried again, twice.

    Raises:
        InputError: there is no such file.
        StorageError: it cannot be opened.
    """
    if not is_address(path):
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            raise InputError(f"{escape(path)}: there is no such file") from error
        except OSError as error:
            raise StorageError(f"{escape(path)}: cannot be opened ({error.strerror})") from error
    system, name = _file_system(path)
    for delay in (*_RETRY_AFTER_S, None):
        try:
            with _reaching(path):
                return system.open(name, "rb")
        except StorageError as error:
            if delay is None:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


def file_exists(path: str) -> bool:
    """Whether there is such a regular file."""
    if not is_address(path):
        return os.path.isfile(path)
    system, name = _file_system(path)
    with _reaching(path):
        return system.isfile(name)


def file_size(path: str) -> int:
    """Bytes of a file."""
    if is_address(path):
        system, name = _file_system(path)
        with _reaching(path):
            return system.size(name)
    with reading(path):
        return os.stat(path).st_size


def fingerprint(path: str) -> tuple[str, int, int]:
    """What changes when a file is written anew; the key of what is remembered about it."""
    if is_address(path):
        return path, file_size(path), 0
    with reading(path):
        status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns
