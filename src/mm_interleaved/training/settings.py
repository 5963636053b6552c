"""The settings of a run: frozen dataclasses whose field docstrings say what each is for.

Default < recipe < `--set a.b=c`. `override` applies the last; `to_record` is what stands as JSON beside a
checkpoint.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mm_interleaved.devices import NumberFormat, training_format
from mm_interleaved.errors import UsageError, escape

if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings")

OPTIMIZERS = ("adamw", "muon")
LOG_NAME = "log.jsonl"
"""Where a stage keeps its log, in its folder."""
_MAX_SUGGESTED = 5


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers a setting takes. Every numeric setting has one, written beside its type."""

    low: float
    high: float
    """Chosen such that nothing that is computed with the setting overflows or never ends."""
    excludes_low: bool = False
    excludes_high: bool = False

    def __contains__(self, value: float) -> bool:
        # Not a number is in no range.
        is_low = self.low < value if self.excludes_low else self.low <= value
        return is_low and (value < self.high if self.excludes_high else value <= self.high)

    def refusal(self, name: str, value: float) -> str:
        """The sentence for a value outside."""
        if self.high == 1:
            left, right = "(" if self.excludes_low else "[", ")" if self.excludes_high else "]"
            expected = f"must lie in {left}{self.low}, 1{right}"
        elif value > self.high:
            expected = f"must be at most {self.high:g}"
        else:
            expected = f"must be more than {self.low}" if self.excludes_low else f"must be {self.low} or more"
        return f"{name} {expected}, found {value}"


COUNT = Range(1, 2**31 - 1)
NUMBER = Range(0, 2**31 - 1)
"""A count that may be none."""
SEED = Range(0, 2**63 - 1)
PROCESSES = Range(0, 1024)
SIZE = Range(1, 2**20)
"""Rows, tokens, channels: what takes memory."""
RATE = Range(0, 1000)
"""Learning rates and decays."""
FACTOR = Range(0, 1e6)
"""Weights of losses and the like."""
SHARE = Range(0, 1)
DECAY = Range(0, 1, excludes_high=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """How one stage is trained. Its data and its loss are the stage's own business."""

    steps: Annotated[int, COUNT]
    """Optimizer steps in all; with `--resume` a larger number goes on from the last checkpoint."""
    learning_rate: Annotated[float, RATE]
    """Highest learning rate, reached after the warm-up and held until the decay."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices inside the networks (AdamW for all else)."""
    warmup_steps: Annotated[int, NUMBER] = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: Annotated[float, SHARE] = 0.3
    """Last part of the steps, over which the learning rate falls to 0 along a half cosine."""
    weight_decay: Annotated[float, RATE] = 0.01
    """A step's, times the learning rate; matrices and kernels only."""
    beta_1: Annotated[float, DECAY] = 0.9
    """AdamW's first-moment decay."""
    beta_2: Annotated[float, DECAY] = 0.98
    """AdamW's second-moment decay."""
    epsilon: Annotated[float, SHARE] = 1e-8
    """AdamW's addition to the root of the second moment."""
    max_grad_norm: Annotated[float, FACTOR] = 1.0
    """Gradients are scaled down to this norm; 0 = they are left as they are."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay a step of the averaged weights, which are the ones that a stage hands on; 0 keeps no average."""
    use_bfloat16: bool | None = False
    """Run convolutions and matrix products in bfloat16 (autocast), weights staying in float32. `none`: where
    the device has units for it; a GPU without them runs in float16, a CPU in float32."""
    use_float16: bool = False
    """The same in float16, with a loss scale that adapts itself; for GPUs without bfloat16."""
    save_every: Annotated[int, COUNT] = 200
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, COUNT] = 2
    """Checkpoints that stay; older ones are deleted."""
    log_every: Annotated[int, COUNT] = 20
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.use_bfloat16 and self.use_float16:
            raise UsageError("use_bfloat16 and use_float16 exclude each other, found both true")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")

    def number_format(self, device: "torch.device") -> NumberFormat:
        """The format that convolutions and matrix products run in on a device."""
        named = {True: "bfloat16", False: "float32", None: None}[self.use_bfloat16]
        return training_format("float16" if self.use_float16 else named, device)


def check_ranges(settings: Any) -> None:
    """Refuses numbers outside the ranges of their settings; None is not looked at.

    Raises:
        UsageError: names the first of them.
    """
    for name, wanted in number_ranges(type(settings)).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if number not in wanted:
                raise UsageError(wanted.refusal(name, number))


@lru_cache
def number_ranges(kind: type) -> Mapping[str, Range]:
    """The range of each numeric setting of a dataclass, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Range)
    }


def override(settings: Settings, assignments: typing.Iterable[str]) -> Settings:
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
        changes[path] = _parse(value.strip(), _type_of(settings, path, name.strip()), name.strip())
    return _changed(settings, changes)


def to_record(settings: Any) -> dict[str, Any]:
    """The settings as nested JSON objects."""
    return dataclasses.asdict(settings)


def from_record(kind: type[Settings], record: Any, name: str = "settings") -> Settings:
    """The settings that `to_record` made a record of, also after a way through JSON.

    Args:
        name: of what is read, for messages.

    Raises:
        UsageError: an unknown name, or a value of the wrong type.
    """
    return _from_json(record, kind, name)


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """Every name that `override` accepts."""
    return list(flat_record(settings, prefix))


def flat_record(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by the name that `override` takes for it."""
    values: dict[str, Any] = {}
    for name, value in _children(settings).items():
        values |= flat_record(value, f"{prefix}{name}.") if _is_group(value) else {prefix + name: value}
    return values


def _is_group(value: Any) -> bool:
    """Settings below a name of their own: a dataclass, or a mapping of names to dataclasses."""
    if isinstance(value, Mapping):
        return all(map(_is_group, value.values()))
    return dataclasses.is_dataclass(value)


def _children(settings: Any) -> dict[str, Any]:
    if isinstance(settings, Mapping):
        return dict(settings)
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def _type_of(settings: Any, path: Sequence[str], full_name: str) -> Any:
    """The type of the setting at the end of a path."""
    *groups, last = path
    reached = settings
    for name in groups:
        reached = _member(settings, reached, name, full_name, is_group=True)
    _member(settings, reached, last, full_name, is_group=False)
    return typing.get_type_hints(type(reached))[last]


def _member(settings: Any, reached: Any, name: str, full_name: str, *, is_group: bool) -> Any:
    """What a group holds by a name. Raises UsageError, with a suggestion out of all settings."""
    children = _children(reached)
    if name not in children or _is_group(children[name]) != is_group:
        suggestion = _suggestion(settings, reached, full_name)
        raise UsageError(f"--set {escape(full_name)}: no such setting{suggestion}")
    return children[name]


def stages(settings: Any, prefix: str = "") -> dict[str, StageConfig]:
    """Every stage among the settings, by its name."""
    found: dict[str, StageConfig] = {}
    for name, value in _children(settings).items():
        if isinstance(value, StageConfig):
            found[prefix + name] = value
        elif _is_group(value):
            found |= stages(value, f"{prefix}{name}.")
    return found


def _changed(settings: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """The settings with the values at the ends of some paths exchanged."""
    values = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in dict.fromkeys(path[0] for path in changes if len(path) > 1):
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        group = _children(settings)[name]
        try:
            values[name] = _changed(group, inner)
        except UsageError as error:
            # What a group refuses names its own settings; those of a user begin with the group.
            is_own = re.split(r"[ .]", str(error))[0] in _children(group)
            raise UsageError(f"{name}.{error}" if is_own else str(error)) from error
    return (
        {**settings, **values} if isinstance(settings, Mapping) else dataclasses.replace(settings, **values)
    )


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
        return f"; known are {', '.join(_children(reached))}"
    *others, final = close[:_MAX_SUGGESTED]
    more = " ..." if len(close) > _MAX_SUGGESTED else ""
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{final}{more}?"


def _parse(value: str, kind: Any, full_name: str) -> Any:
    try:
        if _is_optional(kind):
            return None if value == "none" else _parse(value, typing.get_args(kind)[0], full_name)
        if typing.get_origin(kind) is tuple:
            items = value.split(",") if value else ()
            return tuple(_parse(item, typing.get_args(kind)[0], full_name) for item in items)
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        expected = getattr(kind, "__name__", str(kind))
        found = escape(repr(value))
        raise UsageError(f"--set {full_name}: expected {expected}, found {found}") from None


def _is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _from_json(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as a value of a type; what JSON has no word for (tuples, dataclasses) is made again."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_optional(kind):
        return None if value is None else _from_json(value, arguments[0], name)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _check_names(value, dataclasses.fields(kind), name)
        made = {key: _from_json(item, hints[key], f"{name}.{key}") for key, item in value.items()}
        return typing.cast(Any, kind)(**made)
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(item, arguments[0], name) for item in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _from_json(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind not in (int, float, bool, str) or type(value) is not kind:
        expected = getattr(kind, "__name__", str(kind))
        raise UsageError(f"{name}: expected {expected}, found {escape(repr(value))}")
    return value


def _check_names(value: Any, known: Sequence[dataclasses.Field], name: str) -> None:
    """Refuses what is no JSON object of these fields, or lacks one that has no default."""
    names = [field.name for field in known]
    if not isinstance(value, Mapping) or set(value) - set(names):
        found = sorted(set(value) - set(names)) if isinstance(value, Mapping) else type(value).__name__
        raise UsageError(f"{name}: expected some of {', '.join(names)}, found {escape(str(found))}")
    nothing = dataclasses.MISSING
    needed = [field.name for field in known if field.default is nothing and field.default_factory is nothing]
    missing = [field for field in needed if field not in value]
    if missing:
        raise UsageError(f"{name}.{missing[0]}: missing")
