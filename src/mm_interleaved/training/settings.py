"""The settings of a run: frozen dataclasses whose field docstrings say what each is for.

Default < recipe < `--set a.b=c`. `override` applies the last; `to_record` is what stands as JSON beside a
checkpoint.
"""

import dataclasses
import difflib
import types
import typing
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
    beta_2: float = 0.98
    """AdamW's second-moment decay; its first is 0.9."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights, which are the ones that a stage hands on; 0 keeps no average."""
    use_bfloat16: bool = False
    """Run convolutions and matrix products in bfloat16 (autocast), weights staying in float32."""
    save_every: int = 200
    """Steps between two checkpoints."""
    log_every: int = 20
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.log_every < 1:
            raise UsageError(
                "steps, save_every and log_every must be 1 or more, found "
                f"{self.steps}, {self.save_every}, {self.log_every}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")
        if not 0 <= self.decay_fraction <= 1:
            raise UsageError(f"decay_fraction must lie in [0, 1], found {self.decay_fraction}")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay must lie in [0, 1), found {self.ema_decay}")


def override(settings: Settings, assignments: typing.Iterable[str]) -> Settings:
    """The settings with assignments such as `image.steps=500` applied.

    Raises:
        UsageError: not of the form name=value, a name that does not exist, or a value of the wrong type.
    """
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected name=value")
        settings = _assign(settings, name.strip().split("."), value.strip(), name.strip())
    return settings


def to_record(settings: Any) -> dict[str, Any]:
    """The settings as nested JSON objects."""
    return dataclasses.asdict(settings)


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """Every name that `override` accepts."""
    names = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            names += setting_names(value, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def _assign(settings: Any, path: list[str], value: str, full_name: str) -> Any:
    name, *rest = path
    field = next((field for field in dataclasses.fields(settings) if field.name == name), None)
    if field is None or dataclasses.is_dataclass(getattr(settings, name)) != bool(rest):
        raise UsageError(f"--set {full_name}: no such setting{_suggestion(settings, full_name, path)}")
    if rest:
        return dataclasses.replace(
            settings, **{name: _assign(getattr(settings, name), rest, value, full_name)}
        )
    hints = typing.get_type_hints(type(settings))
    return dataclasses.replace(settings, **{name: _parse(value, hints[name], full_name)})


def _suggestion(settings: Any, full_name: str, path: list[str]) -> str:
    prefix = full_name.removesuffix(".".join(path))
    close = difflib.get_close_matches(full_name, setting_names(settings, prefix), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _parse(value: str, kind: Any, full_name: str) -> Any:
    try:
        if isinstance(kind, types.UnionType):
            return None if value == "none" else _parse(value, typing.get_args(kind)[0], full_name)
        if typing.get_origin(kind) is tuple:
            return tuple(_parse(item, typing.get_args(kind)[0], full_name) for item in value.split(","))
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        expected = getattr(kind, "__name__", str(kind))
        raise UsageError(f"--set {full_name}: expected {expected}, found {value!r}") from None
