"""How one stage is trained, and the ranges that settings of training share.

Default < recipe < `--set a.b=c`; `typed_settings` applies the last, and writes what stands as JSON beside a
checkpoint.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from mm_interleaved.devices import NumberFormat, training_format
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.typed_settings import (
    COUNT,
    NUMBER,
    SHARE,
    Choice,
    Limit,
    Range,
    children,
    is_group,
    misfits,
)

if TYPE_CHECKING:
    import torch

OPTIMIZERS = ("adamw", "muon")
LOG_NAME = "log.jsonl"
"""Where a stage keeps its log, in its folder."""


PROCESSES = Range(0, 1024)
SIZE = Range(1, 2**20)
"""Rows, tokens, channels: what takes memory."""
RATE = Range(0, 1000)
"""Learning rates and decays."""
FACTOR = Range(0, 1e6)
"""Weights of losses and the like."""
DECAY = Range(0, 1, excludes_high=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """How one stage is trained. Its data and its loss are the stage's own business."""

    steps: Annotated[int, COUNT]
    """Optimizer steps in all; with `--resume` a larger number goes on from the last checkpoint."""
    learning_rate: Annotated[float, RATE]
    """Highest learning rate, reached after the warm-up and held until the decay."""
    optimizer: Annotated[str, Choice(OPTIMIZERS)] = "adamw"
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

    def number_format(self, device: "torch.device") -> NumberFormat:
        """The format that convolutions and matrix products run in on a device."""
        named = {True: "bfloat16", False: "float32", None: None}[self.use_bfloat16]
        return training_format("float16" if self.use_float16 else named, device)


def check_ranges(settings: Any) -> None:
    """Refuses values outside the ranges and choices of their settings.

    Raises:
        UsageError: names the first of them.
    """
    for name, value, limit in misfits(settings):
        raise UsageError(_refusal(name, value, limit))


def _refusal(name: str, value: Any, limit: Limit) -> str:
    if isinstance(limit, Choice):
        return f"{name} must be one of {', '.join(limit.names)}, found {escape(repr(value))}"
    if limit.high == 1:
        left, right = "(" if limit.excludes_low else "[", ")" if limit.excludes_high else "]"
        expected = f"must lie in {left}{limit.low}, 1{right}"
    elif value > limit.high:
        expected = f"must be at most {limit.high:g}"
    else:
        expected = f"must be more than {limit.low}" if limit.excludes_low else f"must be {limit.low} or more"
    return f"{name} {expected}, found {value}"


def stages(settings: Any, prefix: str = "") -> dict[str, StageConfig]:
    """Every stage among the settings, by its name."""
    found: dict[str, StageConfig] = {}
    for name, value in children(settings).items():
        if isinstance(value, StageConfig):
            found[prefix + name] = value
        elif is_group(value):
            found |= stages(value, f"{prefix}{name}.")
    return found
