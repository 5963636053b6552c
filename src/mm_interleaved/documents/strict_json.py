"""JSON files read strictly, and their values read by the path they stand at.

Python's own parser takes the last of two equal keys, takes NaN, and follows any nesting; a record that means
something else than it says is refused here, with file, line and column, or file, line and field.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from mm_interleaved.documents.images import file_kind
from mm_interleaved.errors import InputError, escape

MAX_RECORD_BYTES = 256 * 2**20
"""Of a line, or of a `.json` file. Images may stand in it as `data:` URLs."""
MAX_TEXT = 1_000_000
"""Characters of one text: no context is that long, and a tokenizer would take minutes."""
MAX_DEPTH = 64
MAX_DIGITS = 40

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
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class FieldError(ValueError):
    """A value that is wrong, and where in its record; whoever knows the file makes an InputError of it."""

    def __init__(self, path: str, problem: str):
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path

    def at(self, place: str) -> InputError:
        """The same error, of a record at `place` (file and line)."""
        return InputError(f"{place}: {self}", field=self.path or None)


Used = dict[Any, "Used"]
"""What was asked for in an object or a list: its keys or indices, and what was asked for below each."""

_WHOLE = object()
"""In `Used`: everything below was taken as it is."""
_LEAF: Used = {}
"""In `Used`: a value with nothing below it."""
_NOTHING = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Field:
    """A JSON value and its path in the record, such as `content[2].image`. Wrong kinds raise FieldError.

    A tracked field knows which of the fields below it were asked for, through whatever copies of it.
    """

    value: Any
    path: str = ""
    used: Used | None = field(default=None, compare=False, repr=False)

    def tracked(self) -> Field:
        """The same value, nothing of it asked for yet."""
        return Field(self.value, self.path, {})

    def whole(self) -> Any:
        """The value, all of it taken as it is."""
        if self.used is not None:
            self.used[_WHOLE] = {}
        return self.value

    def unused(self) -> Iterator[Field]:
        """Of a tracked field: the fields below that nobody asked for and that hold anything, topmost ones."""
        if self.used is None or _WHOLE in self.used:
            return
        if isinstance(self.value, dict):
            for key, value in self.value.items():
                if key not in self.used:
                    if value not in _NOTHING:
                        yield self._below(key)
                elif isinstance(value, dict | list):
                    yield from self._below(key).unused()
        else:
            for index in self.used:
                if isinstance(self.value[index], dict | list):
                    yield from self._below(index).unused()

    def wrong(self, expected: str) -> NoReturn:
        """Raise that something else was expected here."""
        raise FieldError(self.path, f"found {describe(self.value)}, expected {expected}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def __getitem__(self, key: str) -> Field:
        """A field of an object."""
        if key not in self.object():
            found = ", ".join(escape(k, 40) for k in self.value) or "no fields"
            raise FieldError(self._child(key), f"missing, found {found}")
        return self._below(key)

    def get(self, key: str) -> Field | None:
        """A field of an object, None where it is absent or null."""
        return self[key] if key in self and self.value[key] is not None else None

    def object(self) -> dict[str, Any]:
        return self.value if isinstance(self.value, dict) else self.wrong("an object")

    def list(self) -> list[Field]:
        if not isinstance(self.value, list):
            self.wrong("a list")
        if self.used is None:
            return [Field(item, f"{self.path}[{index}]") for index, item in enumerate(self.value)]
        # Only an object or a list has something below it that can be left unused.
        return [
            self._below(index) if isinstance(item, dict | list) else Field(item, f"{self.path}[{index}]")
            for index, item in enumerate(self.value)
        ]

    def text(self, max_length: int = MAX_TEXT) -> str:
        if not isinstance(self.value, str):
            self.wrong("a string")
        if len(self.value) > max_length:
            raise FieldError(self.path, f"found {len(self.value)} characters, expected at most {max_length}")
        return self.value

    def boolean(self) -> bool:
        return self.value if isinstance(self.value, bool) else self.wrong("true or false")

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        is_integer = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not is_integer or not low <= self.value <= high:
            self.wrong(f"a whole number from {low} to {high}")
        return self.value

    def _below(self, key: str | int) -> Field:
        """What stands under a key of the object or an index of the list; it counts as asked for."""
        value = self.value[key]
        path = f"{self.path}[{key}]" if isinstance(key, int) else self._child(key)
        if self.used is None:
            return Field(value, path)
        if isinstance(value, dict | list):
            return Field(value, path, self.used.setdefault(key, {}))
        self.used[key] = _LEAF
        return Field(value, path)

    def _child(self, key: str) -> str:
        # Nearly every name is plain; all of them come through here.
        name = key if len(key) <= 40 and key.isprintable() else escape(key, 40)
        return f"{self.path}.{name}" if self.path else name


def describe(value: Any) -> str:
    """A JSON value in a few words, for messages."""
    if isinstance(value, str):
        return f"the string {escape(value, 40)!r}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    # A record made in Python may hold what no JSON does.
    return _KINDS.get(type(value), type(value).__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file."""

    place: str
    """File, and line where there are lines."""
    number: int
    """The line, or the place in a list, from 1."""
    field: Field


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a `.jsonl` file (one a line) or of a `.json` file (one, or a list of them).

    A byte-order mark, blank lines, Windows line ends and a missing last line end are all right. Either kind
    may be compressed (`.gz`); `-` is what is piped in, lines or one JSON value.

    Raises:
        InputError: missing, not a regular file, not UTF-8, not strict JSON, or too large.
    """
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
def _opened(path: Path) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, bool]]:
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


def parse_strict(text: str, place: str, first_line: int | None = 1) -> Any:
    """The value of a JSON text.

    Args:
        place: file (and line) for messages.
        first_line: number of the text's first line, to go into messages; None where `place` already names it.
    """

    def refuse(problem: str) -> NoReturn:
        raise InputError(f"{place}: {problem}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            refuse(f"found the field {escape(twice, 40)!r} twice in one object")
        return found

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= MAX_DIGITS else refuse(f"found a number of {len(digits)} digits")

    def fraction(digits: str) -> float:
        value = float(digits)
        return (
            value
            if math.isfinite(value)
            else refuse(f"found the number {escape(digits, 40)}, expected a finite one")
        )

    def constant(name: str) -> NoReturn:
        refuse(f"found {name}, which is not JSON")

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_int=whole, parse_float=fraction, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        line = "" if first_line is None else f":{error.lineno + first_line - 1}"
        raise InputError(f"{place}{line}:{error.colno}: not JSON ({error.msg})") from error
    except RecursionError:
        refuse(f"nested more than {MAX_DEPTH} levels deep")
    try:
        _check_values(value)
    except FieldError as error:
        raise error.at(place) from error
    return value


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
        raise InputError(f"{path}: found a {found}, expected a .json or .jsonl file{instead}")


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


_Path = tuple[Any, str | int]
"""Where a value stands in a document: its holder's path (None: the whole), and its name or index there."""


def _written(path: _Path | None) -> str:
    """As in messages: `parts[0].text`."""
    steps = []
    while path is not None:
        path, step = path
        steps.append(f"[{step}]" if isinstance(step, int) else f".{escape(step, 40)}")
    return "".join(reversed(steps)).lstrip(".")


def _check_values(value: Any):
    """Depth, and text that is no Unicode (`"\\ud800"` is correct JSON), of all values."""
    # A path is written out for who reads an error only: a model's header has thousands of them.
    pending: list[tuple[Any, _Path | None, int]] = [(value, None, 1)]
    while pending:
        item, path, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise FieldError("", f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, dict):
            pending += [(name, (path, name), depth) for name in item]
            pending += [(v, (path, name), depth + 1) for name, v in item.items()]
        elif isinstance(item, list):
            pending += [(v, (path, index), depth + 1) for index, v in enumerate(item)]
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(item[error.start])
                raise FieldError(
                    _written(path), f"found the lone surrogate U+{code:04X}, expected Unicode text"
                ) from error
