"""Compressed files of records: a zip with one file in it, or gzip; neither may become too large."""

from __future__ import annotations

import errno
import gzip
import struct
import zipfile
import zlib
from contextlib import ExitStack
from typing import IO, Any

from mm_interleaved.data.storage.files import file_size, is_hidden
from mm_interleaved.documents.record_files import GZIP_DAMAGE
from mm_interleaved.errors import InputError, StorageError, escape

_MAX_RATIO = 200
"""A zip that promises to become more times larger than this is refused; JSON shrinks to a tenth or so."""
_SMALL_BYTES = 64 << 20
DAMAGE = (zipfile.BadZipFile, *GZIP_DAMAGE, zlib.error, struct.error, ValueError)
"""What zipfile and gzip raise where the bytes make no sense; zipfile an OSError too."""


def unzipped(stack: ExitStack, file: IO[bytes], path: str) -> tuple[IO[bytes], str]:
    """The one file in a zip, and its name."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = [
            member for member in archive.infolist() if not member.is_dir() and not is_hidden(member.filename)
        ]
        if len(members) != 1:
            raise InputError(f"{path}: found {len(members)} files in the zip, expected one")
        [member] = members
        if member.flag_bits & 1:
            raise InputError(f"{path}: is encrypted, expected a plain zip")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: found the compression {member.compress_type}, expected deflate")
        if member.file_size > max(_SMALL_BYTES, _MAX_RATIO * member.compress_size):
            raise InputError(
                f"{path}: {member.compress_size} bytes that become {member.file_size}, expected at most "
                f"{_MAX_RATIO} times as many"
            )
        return stack.enter_context(archive.open(member)), member.filename
    except (*DAMAGE, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged, or no zip ({escape(str(error))})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        # A place before the beginning of the file.
        raise InputError(f"{path}: damaged, or no zip ({error.strerror})") from error


def ungzipped(stack: ExitStack, file: IO[bytes], path: str) -> Any:
    """The contents of a gzip file."""
    limit = max(_SMALL_BYTES, _MAX_RATIO * file_size(path))
    return _Unpacked(stack.enter_context(gzip.GzipFile(fileobj=file)), limit, path)


class _Unpacked:
    """A gzip file that is read no further than an honest one goes; nothing in it states how far that is."""

    def __init__(self, file: gzip.GzipFile, limit: int, path: str):
        self.file, self.limit, self.path = file, limit, path

    def read(self, size: int) -> bytes:
        return self._checked(self.file.read(size))

    def readline(self, size: int) -> bytes:
        return self._checked(self.file.readline(size))

    def _checked(self, data: bytes) -> bytes:
        if self.file.tell() > self.limit:
            raise InputError(f"{self.path}: becomes more than {self.limit} bytes, expected a smaller file")
        return data
