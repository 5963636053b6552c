"""AdamW, its learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm_interleaved.training.settings import StageConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels, not on biases, norms and gates."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta_2), eps=1e-8)


def learning_rate(step: int, config: StageConfig) -> float:
    """Linear warm-up, a plateau, then a half cosine down to 0; a function of the step alone."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = config.decay_fraction * config.steps
    left = (config.steps - step) / decay_steps if decay_steps else 1.0
    cold = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
    return config.learning_rate * warm * cold


class AveragedWeights:
    """An exponential moving average of trained parameters.

    The decay grows with the steps up to its limit, so that the random start is forgotten early: the usual
    min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Moves the average towards the parameters as they are after optimizer step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.tensors)
        torch._foreach_lerp_([self.tensors[n] for n in names], [parameters[n] for n in names], 1 - decay)


def optimizer_tensors(optimizer: torch.optim.AdamW, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """The moments and step counts by parameter name, as plain tensors."""
    return {
        f"{names[parameter]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` took out."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = {key: tensors.get(f"{names[parameter]}:{key}") for key in keys}
            if found["step"] is not None:  # a parameter that never got a gradient has no state
                optimizer.state[parameter] = found
