"""What a tar holds, read strictly: nothing is unpacked to disk, and a cut or damaged archive never passes.

`tarfile` takes a damaged header, or a file that ends between two members, for the end of the archive. Here an
archive is whole only if the block of zeros that ends it stands where its last member ends.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

from mm_interleaved.data.storage.files import is_hidden, open_file, reading
from mm_interleaved.data.storage.manifests import check_against_manifest
from mm_interleaved.documents.images import MAX_FILE_BYTES
from mm_interleaved.errors import InputError, escape

_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    start: int
    """Offset of its first byte in the tar."""
    size: int
    problem: str = ""
    """Why it must not be used; empty for an ordinary file."""


def tar_members(file: IO[bytes], path: str) -> Iterator[Member]:
    """The members in order, without folders and hidden files. Only headers are read.

    Raises:
        InputError: no tar, cut, or damaged; the members before that place have been given out.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                if not info.isdir() and not is_hidden(info.name):
                    yield Member(info.name, info.offset_data, info.size, _problem(info))
            file.seek(archive.offset)
            end = file.read(_BLOCK_BYTES)
    except (tarfile.TarError, ValueError, UnicodeError) as error:
        raise InputError(f"{path}: a damaged or cut tar ({escape(str(error))})") from error
    if end != bytes(_BLOCK_BYTES):
        found = "a damaged header" if len(end) == _BLOCK_BYTES else "the end of the file"
        raise InputError(
            f"{path}: found {found} at byte {archive.offset}, expected another member or the end mark"
        )


def _problem(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "is a link"
    if not info.isreg() or info.issparse():
        return "is no ordinary file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "lies outside the archive"
    if info.size > MAX_FILE_BYTES:
        return f"has {info.size} bytes, expected at most {MAX_FILE_BYTES}"
    return ""


def member_bytes(file: IO[bytes], member: Member, path: str) -> bytes:
    """The contents of a member. Raises InputError where the archive ends within it."""
    with reading(path):
        file.seek(member.start)
        data = file.read(member.size)
    if len(data) != member.size:
        raise InputError(f"{path}: {escape(member.name)}: the archive ends within it")
    return data


@lru_cache(maxsize=256)
def tar_index(key: tuple[str, int, int]) -> Mapping[str, Member]:
    """The members of a tar by name, and by the last part of it; remembered. `key` is a `fingerprint`."""
    path = key[0]
    check_against_manifest(path)
    with open_file(path) as file, reading(path):
        members = {member.name.removeprefix("./"): member for member in tar_members(file, path)}
    for name, member in list(members.items()):
        members.setdefault(name.rsplit("/", 1)[-1], member)
    return members
