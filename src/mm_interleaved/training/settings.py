"""The settings of a run: frozen dataclasses whose field docstrings say what each is for.

Default < recipe < `--set a.b=c`. `override` applies the last; `to_record` is what stands as JSON beside a
checkpoint.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mm_interleaved.errors import UsageError

Settings = TypeVar("Settings")

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """How one stage is trained. Its data and its loss are the stage's own business."""

    steps: int
    """Optimizer steps in all; with `--resume` a larger number goes on from the last checkpoint."""
    learning_rate: float
    """Highest learning rate, reached after the warm-up and held until the decay."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices inside the networks (AdamW for all else)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.3
    """Last part of the steps, over which the learning rate falls to 0 along a half cosine."""
    weight_decay: float = 0.01
    """A step's, times the learning rate; matrices and kernels only."""
    beta_1: float = 0.9
    """AdamW's first-moment decay."""
    beta_2: float = 0.98
    """AdamW's second-moment decay."""
    epsilon: float = 1e-8
    """AdamW's addition to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 = they are left as they are."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights, which are the ones that a stage hands on; 0 keeps no average."""
    use_bfloat16: bool = False
    """Run convolutions and matrix products in bfloat16 (autocast), weights staying in float32."""
    use_float16: bool = False
    """The same in float16, with a loss scale that adapts itself; for GPUs without bfloat16."""
    save_every: int = 200
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are deleted."""
    log_every: int = 20
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "save_every", "keep_checkpoints", "log_every")
        check_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "epsilon", "max_grad_norm")
        if self.use_bfloat16 and self.use_float16:
            raise UsageError("use_bfloat16 and use_float16 exclude each other, found both true")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")
        check_shares(self, "decay_fraction")
        for name in ("ema_decay", "beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must lie in [0, 1), found {getattr(self, name)}")


def check_least(settings: Any, least: float, *names: str) -> None:
    """Refuses numbers below a limit, and such that are not finite; None is not looked at.

    Raises:
        UsageError: names the first of them.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"{name} must be {least} or more, found {value}")


def check_shares(settings: Any, *names: str) -> None:
    """Refuses numbers outside of [0, 1], as `check_least` does."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} must lie in [0, 1], found {value}")


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
    name, *rest = path
    children = _children(settings)
    if name not in children or _is_group(children[name]) != bool(rest):
        raise UsageError(f"--set {full_name}: no such setting{_suggestion(settings, full_name, path)}")
    return _type_of(children[name], rest, full_name) if rest else typing.get_type_hints(type(settings))[name]


def _changed(settings: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """The settings with the values at the ends of some paths exchanged."""
    values = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in dict.fromkeys(path[0] for path in changes if len(path) > 1):
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        values[name] = _changed(_children(settings)[name], inner)
    return (
        {**settings, **values} if isinstance(settings, Mapping) else dataclasses.replace(settings, **values)
    )


def _suggestion(settings: Any, full_name: str, path: Sequence[str]) -> str:
    prefix = full_name.removesuffix(".".join(path))
    close = difflib.get_close_matches(full_name, setting_names(settings, prefix), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _parse(value: str, kind: Any, full_name: str) -> Any:
    try:
        if isinstance(kind, types.UnionType):
            return None if value == "none" else _parse(value, typing.get_args(kind)[0], full_name)
        if typing.get_origin(kind) is tuple:
            items = value.split(",") if value else ()
            return tuple(_parse(item, typing.get_args(kind)[0], full_name) for item in items)
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        expected = getattr(kind, "__name__", str(kind))
        raise UsageError(f"--set {full_name}: expected {expected}, found {value!r}") from None


def _from_json(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as a value of a type; what JSON has no word for (tuples, dataclasses) is made again."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _from_json(value, arguments[0], name)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [field.name for field in dataclasses.fields(kind)]
        if not isinstance(value, Mapping) or set(value) - set(known):
            found = sorted(set(value) - set(known)) if isinstance(value, Mapping) else type(value).__name__
            raise UsageError(f"{name}: expected some of {', '.join(known)}, found {found}")
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
        raise UsageError(f"{name}: expected {expected}, found {value!r}")
    return value
