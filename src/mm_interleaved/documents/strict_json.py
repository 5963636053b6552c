"""JSON files read strictly, and their values read by the path they stand at.

Python's own parser takes the last of two equal keys, takes NaN, and follows any nesting; a record that means
something else than it says is refused here, with file, line and column, or file, line and field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mm_interleaved.errors import InputError, escape

MAX_TEXT = 1_000_000
"""Characters of one text: no context is that long, and a tokenizer would take minutes."""
MAX_DEPTH = 64
MAX_DIGITS = 40

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
