"""The records of a file of JSON, one by one: lines (`.jsonl`, `.txt`), lists (`.json`), a zip of either.

A list is read piece by piece, so that a file of many gigabytes needs the memory of one record. A record that
is not strict JSON is a broken item; the others are read.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain
from types import MappingProxyType
from typing import IO, NoReturn, TypeAlias

from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, attempt
from mm_interleaved.data.storage.compressed import DAMAGE, ungzipped, unzipped
from mm_interleaved.data.storage.files import fingerprint, name_of, open_file, reading
from mm_interleaved.data.storage.manifests import check_against_manifest
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.record_files import GZIP_DAMAGE, MAX_RECORD_BYTES, Record, decoded
from mm_interleaved.documents.record_rules import refuse_content_beside
from mm_interleaved.documents.strict_json import Field, FieldError, parse_strict
from mm_interleaved.errors import InputError, escape

MAX_TABLE_BYTES = 2 << 30
"""Of a JSON file that is read whole."""
REMEMBERED_TABLES = 32
"""Tables that a process keeps: more than a mixture has, since one that falls out is parsed again for each
row stream that begins to read it. Worker processes that are forked inherit those that `shards` has read."""
_CHUNK_BYTES = 1 << 20
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_COLUMN = re.compile(r"^(\d+): ")
_NOT_BLANK = re.compile(rb"\S")
_BOM = b"\xef\xbb\xbf"

_RawValue: TypeAlias = tuple[str, int, bytes]
"""Place for messages, number from 1 (a line's, or a place in a list), the bytes of one JSON value."""


def read_records(path: str, start: int = 0) -> Iterator[tuple[int, Record | BrokenItem]]:
    """The records from position `start` on; those before it are passed over unread.

    Raises:
        StorageError: the storage failed.
    """
    position = -1
    try:
        for position, (place, number, data) in enumerate(_raw_values(path)):
            if position >= start:
                yield position, _record(place, number, data)
    except InputError as error:
        # The rest of the file cannot be told apart into records.
        yield max(position + 1, start), BrokenItem(path, _without_place(error, path))


def read_items(
    path: str,
    start: int,
    build: Callable[[Record, int], Document | FilteredItem],
    known: Collection[str] = (),
) -> Iterator[tuple[int, Item]]:
    """What `build` makes of each record and its position, from position `start` on; broken ones stay so.

    Args:
        known: fields that `build` leaves aside on purpose, see `attempt`.

    Raises:
        StorageError: the storage failed.
    """
    for position, record in read_records(path, start):
        if isinstance(record, BrokenItem):
            yield position, record
        else:
            yield position, _item(record, position, build, known)


def _item(
    record: Record,
    position: int,
    build: Callable[[Record, int], Document | FilteredItem],
    known: Collection[str],
) -> Item:
    def built(field: Field) -> Document | FilteredItem:
        return build(Record(record.place, record.number, field), position)

    return attempt(record.place, built, record.field, known=known)


def read_table(path: str, *used: str) -> Field:
    """A whole JSON file; remembered, as all positions of a shard are read from it.

    Args:
        used: the fields of the table that are used, or left aside on purpose.

    Raises:
        InputError: not there, not strict JSON, or too large; content in other fields, which would be lost.
    """
    table = whole_table(path)
    try:
        refuse_content_beside(table, used)
    except FieldError as error:
        raise error.at(path) from error
    return table


def whole_table(path: str) -> Field:
    """The same, whatever its fields. Raises InputError."""
    check_against_manifest(path)
    return _read_table(fingerprint(path))


@lru_cache(maxsize=REMEMBERED_TABLES)
def _read_table(key: tuple[str, int, int]) -> Field:
    path, size, _ = key
    if size > MAX_TABLE_BYTES:
        raise InputError(f"{escape(path)}: found {size} bytes, expected at most {MAX_TABLE_BYTES}")
    data = _table_bytes(path)
    return Field(parse_strict(decoded(data, path, is_start=True), path))


def _table_bytes(path: str) -> bytes:
    try:
        with open_file(path) as file, reading(path):
            if not name_of(path).lower().endswith(".gz"):
                return file.read()
            with ExitStack() as stack:
                data = ungzipped(stack, file, path).read(MAX_TABLE_BYTES + 1)
    except GZIP_DAMAGE as error:
        raise InputError(f"{escape(path)}: damaged, or no gzip ({escape(str(error))})") from error
    if len(data) > MAX_TABLE_BYTES:
        raise InputError(f"{escape(path)}: becomes more than {MAX_TABLE_BYTES} bytes, expected fewer")
    return data


def first_record(path: str) -> Field | None:
    """The first value of a file, to tell its format; None where there is no sound one."""
    _, item = next(read_records(path), (0, None))
    if isinstance(item, Record):
        return item.field
    try:
        # A table may be longer than any record.
        return whole_table(path) if name_of(path).lower().endswith((".json", ".json.gz")) else None
    except InputError:
        return None


def _record(place: str, number: int, data: bytes) -> Record | BrokenItem:
    try:
        if len(data) > MAX_RECORD_BYTES:
            raise InputError(f"{place}: more than {MAX_RECORD_BYTES} bytes, expected a smaller record")
        text = decoded(data, place, is_start=number == 1)
        return Record(place, number, Field(parse_strict(text, place, first_line=None)))
    except InputError as error:
        return BrokenItem(place, _without_place(error, place))


def _without_place(error: InputError, place: str) -> str:
    """What an error states behind its place, with the column named as one."""
    return _COLUMN.sub(r"column \1: ", str(error).removeprefix(place).lstrip(": "))


def _raw_values(path: str) -> Iterator[_RawValue]:
    with ExitStack() as stack:
        check_against_manifest(path)
        file, name = stack.enter_context(open_file(path)), name_of(path).lower()
        if name.endswith(".zip"):
            file, name = unzipped(stack, file, path)
        elif name.endswith(".gz"):
            file, name = ungzipped(stack, file, path), name.removesuffix(".gz")
        read = next((reader for end, reader in _READERS.items() if name.lower().endswith(end)), _lines)
        try:
            with reading(path):
                yield from read(file, path)
        except DAMAGE as error:
            raise InputError(f"{path}: damaged ({escape(str(error))})") from error


def _lines(file: IO[bytes], path: str) -> Iterator[_RawValue]:
    """The lines that are not blank."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        is_complete = line.endswith(b"\n")
        while len(line) > MAX_RECORD_BYTES and not is_complete:
            rest = file.readline(_CHUNK_BYTES)
            is_complete = not rest or rest.endswith(b"\n")
        if line.strip():
            yield f"{path}:{number}", number, line


_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
"""What spreadsheets write between values, a comma first: it is taken where nothing stands between names."""


def _rows(file: IO[bytes], path: str) -> Iterator[_RawValue]:
    """The rows of separated values, each as an object of the names in the first one."""
    # A row may go over several lines, each of them bounded.
    lines = enumerate(iter(partial(file.readline, MAX_RECORD_BYTES), b""), start=1)
    texts = (decoded(line, f"{path}:{number}", number == 1) for number, line in lines)
    header = next(texts, "")
    separator = _separator(header)
    reader = csv.reader(chain([header], texts), strict=True, delimiter=separator)
    try:
        names = next(reader, [])
        for number, row in enumerate(reader, start=1):
            place = f"{path}: row {number}"
            if len(row) != len(names) or len(set(names)) < len(names):
                found, expected = len(row), len(set(names))
                raise InputError(f"{place}: found {found} values, expected {expected} of different names")
            yield place, number, json.dumps(dict(zip(names, row, strict=True))).encode()
    except csv.Error as error:
        kind = _SEPARATORS[separator]
        raise InputError(f"{path}: line {reader.line_num}: not {kind}-separated ({error})") from error


def _separator(header: str) -> str:
    """What stands between the names in the first line of a table, most often; a comma if nothing does."""
    return max(_SEPARATORS, key=header.count)


def _elements(file: IO[bytes], path: str) -> Iterator[_RawValue]:
    """The objects of a list, or the one object that the file is."""
    text = _Text(file, path)
    if text.next_byte() != b"[":
        yield path, 1, text.rest()
        return
    text.skip()
    number = 0
    while (byte := text.next_byte()) != b"]":
        if number:
            if byte != b",":
                text.refuse(number, "expected a comma or the end of the list")
            text.skip()
            byte = text.next_byte()
        if byte != b"{":
            text.refuse(number, "expected an object")
        number += 1
        yield f"{path}[{number - 1}]", number, text.value(number - 1)
    text.skip()
    if text.next_byte():
        raise InputError(f"{path}: found more after the end of the list")


class _Text:
    """A window that moves over the bytes of a JSON file."""

    def __init__(self, file: IO[bytes], path: str):
        self.file, self.path = file, path
        self.buffer = file.read(_CHUNK_BYTES).removeprefix(_BOM)
        self.at = 0

    def next_byte(self) -> bytes:
        """Moves to the next byte that is no blank; empty at the end of the file."""
        while (match := _NOT_BLANK.search(self.buffer, self.at)) is None:
            self.at = len(self.buffer)
            if not self._grow():
                return b""
        self.at = match.start()
        return match.group()

    def skip(self):
        """Moves over one byte."""
        self.at += 1

    def value(self, number: int) -> bytes:
        """The object that begins here; moves behind it."""
        while (end := _end_of_value(self.buffer, self.at)) is None:
            if len(self.buffer) - self.at > MAX_RECORD_BYTES or not self._grow():
                self.refuse(number, "found no end of the object")
        data = self.buffer[self.at : end]
        self.at = end
        return data

    def rest(self) -> bytes:
        """Everything from here on, as far as a record may reach."""
        return self.buffer[self.at :] + self.file.read(MAX_RECORD_BYTES + 1)

    def refuse(self, number: int, problem: str) -> NoReturn:
        raise InputError(f"{self.path}[{number}]: not JSON: {problem}")

    def _grow(self) -> bool:
        """Reads on; False at the end of the file."""
        kept = self.buffer[self.at :]
        # As much as is kept: a long value is scanned again from its beginning, but only a few times.
        more = self.file.read(max(_CHUNK_BYTES, len(kept)))
        self.buffer, self.at = kept + more, 0
        return bool(more)


def _end_of_value(buffer: bytes, begin: int) -> int | None:
    """Where the object that begins at `begin` ends; None where it goes on behind the buffer."""
    depth = 0
    for token in _TOKEN.finditer(buffer, begin):
        kind = token.group()
        if kind == b'"':  # a string without its end
            return None
        depth += (kind in b"[{") - (kind in b"]}")
        if depth == 0:
            return token.end()
    return None


_READERS: Mapping[str, Callable[[IO[bytes], str], Iterator[_RawValue]]] = MappingProxyType(
    {".json": _elements, ".csv": _rows, ".tsv": _rows}
)
"""What reads a file, by the end of its name; others are lines of JSON."""
