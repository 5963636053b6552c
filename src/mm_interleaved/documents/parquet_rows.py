"""Rows of Parquet tables as the JSON that they would be as lines: what fields mean is the same in both.

A table has every field in every row, so that a null stands for a field that is absent (in a list it stays). A
column of text may hold the JSON of a field (`content`, `meta`). Images may stand in the table as bytes, plain
or as `datasets` keeps them (`{"bytes", "path"}`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_interleaved.documents.strict_json import parse_strict
from mm_interleaved.errors import InputError, UsageError, escape

ROWS_AT_ONCE = 64
_NESTED = ("content", "messages", "target", "generation", "meta", "conversations")
"""Fields that are lists or objects; a column of text holds their JSON."""
_DATASETS_IMAGE = {"bytes", "path"}


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of each row, in order.

    Raises:
        UsageError: pyarrow is not installed.
        InputError: no table, damaged, or values that JSON has no form for (times, decimals).
    """
    for number, values in enumerate(_values(path), start=1):
        place = f"{path}: row {number}"
        record = {name: _field(name, value, place) for name, value in values.items() if value is not None}
        # Depth, numbers and text are held to the same rules as those of lines.
        yield place, parse_strict(json.dumps(record), place, first_line=None)


def _values(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow: pip install 'mm-interleaved[train]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except Exception as error:
        # Arrow raises nearly anything over a damaged table (ArrowInvalid, OSError, UnicodeError, ...).
        reason = escape(str(error)) or type(error).__name__
        raise InputError(f"{path}: damaged, or no table ({reason})") from error


def _field(name: str, value: Any, place: str) -> Any:
    if name in _NESTED and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return parse_strict(value, f"{place}: {escape(name)}", first_line=None)
    return _json(value, name, place)


def _json(value: Any, name: str, place: str) -> Any:
    """A value of Arrow as JSON. Raises InputError where there is no such form."""
    if isinstance(value, dict):
        if value.keys() == _DATASETS_IMAGE:
            return _json(value["path"] if value["bytes"] is None else value["bytes"], name, place)
        return {key: _json(each, name, place) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_json(each, name, place) for each in value]
    if isinstance(value, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(
        f"{place}: {escape(name)}: found a {type(value).__name__}, expected text, numbers, lists or bytes",
        field=name,
    )
