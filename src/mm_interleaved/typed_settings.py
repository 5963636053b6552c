"""Typed settings: frozen dataclasses whose fields state their type, their range or choices, and their help.

    num_beams: Annotated[int, Range(1, 64)] = 1
    \"\"\"Beams of the text search; 1 is greedy or sampling.\"\"\"

Settings of generation, of training and of data sources are all read here: from JSON values (`from_json`,
`from_record`), from text such as `image.steps=500` (`override`), and back to JSON (`to_record`). What a value
must be besides its type is written beside the type and checked by `check`, in `__post_init__` of each class.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeAlias, TypeVar

from mm_interleaved.errors import UsageError, escape
from mm_interleaved.spelling import hint

Settings = TypeVar("Settings")

_UNSTATED_LIMIT = 2**31 - 1
"""A limit so high is there for safety; it is not mentioned to who stays below."""
_MAX_SUGGESTED = 5


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers a setting takes."""

    low: float
    high: float = math.inf
    """Chosen such that nothing that is computed with the setting overflows or never ends."""
    excludes_low: bool = False
    excludes_high: bool = False

    def __contains__(self, value: float) -> bool:
        # Not a number is in no range.
        is_low = self.low < value if self.excludes_low else self.low <= value
        return is_low and (value < self.high if self.excludes_high else value <= self.high)

    def expected(self, value: float) -> str:
        """The end of the sentence about a value outside."""
        if self.excludes_low and value <= self.low:
            return f"expected more than {self.low:g}"
        if self.high < _UNSTATED_LIMIT:
            return f"expected {self.low:g} to {self.high:g}"
        return f"expected at most {self.high}" if value > self.high else f"expected {self.low:g} or more"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which words a setting takes."""

    names: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.names

    def expected(self, value: str) -> str:
        """The end of the sentence about a wrong word."""
        return hint(value, self.names)


@dataclass(frozen=True, slots=True)
class Named:
    """Ready-made values by name: what stands for a setting in JSON that is an object in Python."""

    values: Mapping[str, Any]


Limit: TypeAlias = Range | Choice

COUNT = Range(1, 2**31 - 1)
NUMBER = Range(0, 2**31 - 1)
"""A count that may be none."""
SEED = Range(0, 2**63 - 1)
SHARE = Range(0, 1)


# ---- What a field says ----


# Cached: each evaluation of annotations takes a millisecond, and a run builds settings for every document.
@lru_cache
def field_hints(kind: type) -> Mapping[str, Any]:
    """The type hint of each field of a dataclass, with what is written beside the type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@lru_cache
def limits(kind: type) -> Mapping[str, Limit]:
    """The range or the choices of each field of a dataclass that has one."""
    beside = {name: getattr(hint, "__metadata__", ()) for name, hint in field_hints(kind).items()}
    return {name: one for name, extras in beside.items() for one in extras if isinstance(one, Limit)}


def misfits(settings: Any) -> Iterator[tuple[str, Any, Limit]]:
    """Name, value and limit of each setting outside its range or choices; of several values the wrong ones.

    None is in every range: whether a setting may be None is said by its type.
    """
    for name, limit in limits(type(settings)).items():
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if one not in limit:
                yield name, one, limit


def check(settings: Any) -> None:
    """Refuses values outside the ranges and choices of their fields.

    Raises:
        UsageError: names the first of them.
    """
    for name, value, limit in misfits(settings):
        raise UsageError(f"{name}: found {escape(repr(value))}, {limit.expected(value)}", field=name)


# ---- JSON ----


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of one of a type hint's kinds."""
    kinds = _kinds(hint)
    # JSON writes 7 for 7.0, and Python counts True as an int: the first is welcome, the second a slip.
    wanted = (*kinds, int) if float in kinds else kinds
    is_right = isinstance(value, wanted) and (bool in kinds or not isinstance(value, bool))
    return is_right and not (isinstance(value, float) and not math.isfinite(value))


def type_text(hint: Any) -> str:
    """A type hint's kinds in words, such as "int or null"."""
    return " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in _kinds(hint))


def from_json(value: Any, hint: Any, name: str, field: str | None = None) -> Any:
    """A JSON value as a value of a type hint; what JSON has no word for (tuples, dataclasses, ready-made
    values) is made again.

    Args:
        name: of the setting, for messages.
        field: of the error; by default none.

    Raises:
        UsageError: an unknown name, or a value of the wrong type.
    """
    hint, beside = _split(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        # A list stands for a tuple.
        shown: Any = tuple(value) if isinstance(value, list) else value
        fitting = [kind for kind in arguments if fits(shown, kind)]
        if fitting:
            return from_json(value, fitting[0], name, field)
    # A value of the class itself, given in Python, stays what it is.
    for ready_made in (one.values for one in beside if isinstance(one, Named)):
        if isinstance(value, str) and value not in ready_made:
            raise UsageError(f"{name}: {_unknown(value, ready_made)}", field=field)
        if isinstance(value, str):
            return ready_made[value]
    if dataclasses.is_dataclass(hint):
        return from_record(typing.cast(type, hint), value, name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(from_json(item, arguments[0], name, field) for item in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: from_json(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if not fits(value, hint):
        found = escape(repr(value))
        raise UsageError(f"{name}: expected {type_text(hint)}, found {found}", field=field)
    return float(typing.cast(float, value)) if hint is float else value


def from_record(kind: type[Settings], record: Any, name: str = "settings") -> Settings:
    """The settings that `to_record` made a record of, also after a way through JSON.

    Args:
        name: of what is read, for messages.

    Raises:
        UsageError: an unknown name, a missing one that has no default, or a value of the wrong type.
    """
    hints = field_hints(kind)
    if not isinstance(record, Mapping):
        raise UsageError(f"{name}: expected some of {', '.join(hints)}, found {escape(repr(record))}")
    for key in record:
        if key not in hints:
            raise UsageError(f"{name}: {_unknown(key, hints)}")
    for field in dataclasses.fields(typing.cast(Any, kind)):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if not has_default and field.name not in record:
            raise UsageError(f"{name}.{field.name}: missing")
    return kind(**{key: from_json(value, hints[key], f"{name}.{key}") for key, value in record.items()})


def to_record(settings: Any) -> dict[str, Any]:
    """The settings as nested JSON objects."""
    return dataclasses.asdict(settings)


# ---- Text ----


def override(settings: Settings, assignments: Iterable[str]) -> Settings:
    """The settings with assignments such as `image.steps=500` applied, all at once: what they must not be
    together is asked of the result alone, in whatever order they stand.

    Raises:
        UsageError: not of the form name=value, a name that does not exist, a value of the wrong type, or
            values that do not go together.
    """
    changes: dict[tuple[str, ...], Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected name=value")
        path = tuple(name.strip().split("."))
        changes[path] = _from_text(value.strip(), _hint_at(settings, path, name.strip()), name.strip())
    return _changed(settings, changes)


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """Every name that `override` accepts."""
    return list(flat_record(settings, prefix))


def flat_record(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by the name that `override` takes for it."""
    values: dict[str, Any] = {}
    for name, value in children(settings).items():
        values |= flat_record(value, f"{prefix}{name}.") if is_group(value) else {prefix + name: value}
    return values


def is_group(value: Any) -> bool:
    """Whether a value holds settings below names of their own: a dataclass, or a mapping of names to such."""
    if isinstance(value, Mapping):
        return all(map(is_group, value.values()))
    return dataclasses.is_dataclass(value)


def children(group: Any) -> dict[str, Any]:
    """What a group holds, by name."""
    if isinstance(group, Mapping):
        return dict(group)
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def _hint_at(settings: Any, path: Sequence[str], full_name: str) -> Any:
    """The type hint of the setting at the end of a path."""
    *groups, last = path
    reached = settings
    for name in groups:
        reached = _member(settings, reached, name, full_name, wants_group=True)
    _member(settings, reached, last, full_name, wants_group=False)
    return field_hints(type(reached))[last]


def _member(settings: Any, reached: Any, name: str, full_name: str, *, wants_group: bool) -> Any:
    """What a group holds by a name. Raises UsageError, with a suggestion out of all settings."""
    held = children(reached)
    if name not in held or is_group(held[name]) != wants_group:
        suggestion = _suggestion(settings, reached, full_name)
        raise UsageError(f"--set {escape(full_name)}: no such setting{suggestion}")
    return held[name]


def _suggestion(settings: Any, reached: Any, full_name: str) -> str:
    """Settings of the same last name, of a group of nearly that name if there is one; else the setting that
    is spelt most alike; else the names that can follow.

    Args:
        settings: all of them.
        reached: the group up to which the name is right.
    """
    names = setting_names(settings)
    group, _, last = full_name.rpartition(".")
    groups = {name: name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == last}
    near = difflib.get_close_matches(group, groups.values(), n=1, cutoff=0.7) if group else []
    close = [name for name, its in groups.items() if name != full_name and its in (near or groups.values())]
    close = close or difflib.get_close_matches(full_name, names, n=1, cutoff=0.4)
    if not close:
        return f"; known are {', '.join(children(reached))}"
    *others, final = close[:_MAX_SUGGESTED]
    more = " ..." if len(close) > _MAX_SUGGESTED else ""
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{final}{more}?"


def _from_text(text: str, hint: Any, full_name: str) -> Any:
    hint, _ = _split(hint)
    arguments = typing.get_args(hint)
    try:
        if _is_union(hint):
            return None if text == "none" else _from_text(text, arguments[0], full_name)
        if typing.get_origin(hint) is tuple:
            return tuple(
                _from_text(item, arguments[0], full_name) for item in (text.split(",") if text else ())
            )
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        return hint(text)
    except (ValueError, KeyError):
        expected = getattr(hint, "__name__", str(hint))
        found = escape(repr(text))
        raise UsageError(f"--set {full_name}: expected {expected}, found {found}") from None


def _changed(settings: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """The settings with the values at the ends of some paths exchanged."""
    values = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in dict.fromkeys(path[0] for path in changes if len(path) > 1):
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        group = children(settings)[name]
        try:
            values[name] = _changed(group, inner)
        except UsageError as error:
            # What a group refuses names its own settings; those of a user begin with the group.
            is_own = re.split(r"[ .:]", str(error))[0] in children(group)
            raise UsageError(f"{name}.{error}" if is_own else str(error)) from error
    return (
        {**settings, **values} if isinstance(settings, Mapping) else dataclasses.replace(settings, **values)
    )


# ---- Type hints ----


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type hint without what is written beside it, and that."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[0], hint.__metadata__
    return hint, ()


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes that a type hint stands for."""
    hint, _ = _split(hint)
    if _is_union(hint):
        return tuple(kind for choice in typing.get_args(hint) for kind in _kinds(choice))
    return (typing.get_origin(hint) or hint,)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    return f"found {escape(str(name), 60)!r}, {hint(str(name), known)}"
