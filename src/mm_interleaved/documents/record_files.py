"""Files of records: JSON lines, or one JSON value, plain or compressed; rows of Parquet; or what is piped in.

Each record is read strictly (`strict_json`) and knows its place, for messages.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mm_interleaved.documents.images import file_kind
from mm_interleaved.documents.parquet_rows import read_rows
from mm_interleaved.documents.strict_json import Field, parse_strict
from mm_interleaved.errors import InputError, escape

MAX_RECORD_BYTES = 256 * 2**20
"""Of a line, or of a `.json` file. Images may stand in it as `data:` URLs."""
STANDARD_INPUT = "-"
"""The path that stands for what is piped in."""
GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)
"""What gzip raises where the bytes make no sense."""
_OTHER_STARTS = (
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\x1f\x8b", "gzip data (its name should end with .gz)"),
    (b"PK\x03\x04", "a zip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file."""

    place: str
    """File, and line where there are lines."""
    number: int
    """The line, or the place in a list, from 1."""
    field: Field


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a `.jsonl` file (one a line), of a `.json` file (one, or a list of them) or of a
    `.parquet` file (one a row, see `parquet_rows`).

    A byte-order mark, blank lines, Windows line ends and a missing last line end are all right. Either kind
    may be compressed (`.gz`); `-` is what is piped in, lines or one JSON value.

    Raises:
        InputError: missing, not a regular file, not UTF-8, not strict JSON, or too large.
    """
    if path.name.lower().endswith(".parquet"):
        _check_regular(path)
        for number, (place, value) in enumerate(read_rows(path), start=1):
            yield Record(place, number, Field(value))
        return
    try:
        with _opened(path) as (file, is_whole):
            if is_whole:
                yield from _whole_file(path, _limited(file.read(MAX_RECORD_BYTES + 1), str(path)))
                return
            number = 0
            while line := file.readline(MAX_RECORD_BYTES + 1):
                number += 1
                place = f"{path}:{number}"
                text = decoded(_limited(line, place), place, is_start=number == 1)
                if text.strip():
                    yield Record(place, number, Field(parse_strict(text, place, first_line=None)))
    except GZIP_DAMAGE as error:
        raise InputError(f"{path}: damaged, or no gzip ({escape(str(error))})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _opened(path: Path) -> Generator[tuple[IO[bytes] | gzip.GzipFile, bool], None, None]:
    """The file's bytes, decompressed, and whether they are one JSON value."""
    if str(path) == STANDARD_INPUT:
        data = standard_input()
        yield io.BytesIO(data), not is_lines(data)
        return
    _check_regular(path)
    name = path.name.lower()
    with open(path, "rb") as file:
        if name.endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield unpacked, name.endswith(".json.gz")
        else:
            yield file, name.endswith(".json")


def standard_input() -> bytes:
    """What is piped in, decompressed where it is gzip. Raises InputError: too much, or damaged."""
    data = sys.stdin.buffer.read(MAX_RECORD_BYTES + 1)
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(MAX_RECORD_BYTES + 1)
    except (*GZIP_DAMAGE, OSError) as error:
        raise InputError(f"standard input: damaged gzip ({escape(str(error))})") from error
    return _limited(data, "standard input")


def is_lines(data: bytes) -> bool:
    """Whether the first line that is not blank is a JSON object by itself, so that others may follow."""
    first = next((line for line in io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")) if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return not data.lstrip().startswith((b"[", b"{"))


def _whole_file(path: Path, data: bytes) -> Iterator[Record]:
    value = parse_strict(decoded(data, str(path), is_start=True), str(path))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield Record(str(path), index + 1, Field(item, f"[{index}]"))
    else:
        yield Record(str(path), 1, Field(value))


def _check_regular(path: Path):
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(mode):
        found, instead = file_kind(mode), files_inside(path) if stat.S_ISDIR(mode) else ""
        raise InputError(f"{path}: found a {found}, expected a .json, .jsonl or .parquet file{instead}")


_DATA_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zip", ".parquet", ".tar", ".txt", ".csv", ".tsv")


def files_inside(folder: str | Path) -> str:
    """Which files to name in place of a folder, as the end of a sentence; empty where it holds none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    by_suffix = {
        suffix: [name for name in names if name.lower().endswith(suffix) and not name.startswith(".")]
        for suffix in _DATA_SUFFIXES
    }
    wanted = [
        os.path.join(folder, found[0] if len(found) == 1 else f"*{suffix}")
        for suffix, found in by_suffix.items()
        if found
    ]
    return f", such as {escape(' or '.join(wanted[:3]), 300)}" if wanted else ""


def _limited(data: bytes, place: str) -> bytes:
    if len(data) > MAX_RECORD_BYTES:
        raise InputError(f"{place}: more than {MAX_RECORD_BYTES} bytes, expected a smaller record")
    return data


def decoded(data: bytes, place: str, is_start: bool) -> str:
    """UTF-8 bytes as text; a byte-order mark may stand at the start of a file. Raises InputError."""
    if is_start:
        for mark, name in _OTHER_STARTS:
            if data.startswith(mark):
                raise InputError(f"{place}: found {name}, expected UTF-8")
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise InputError(f"{place}: byte {error.start} is 0x{byte:02x}, which is not UTF-8") from error
