"""The optimizers, their learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm_interleaved.training.settings import StageConfig


class ParameterRule(NamedTuple):
    """How one parameter learns, where that differs from the stage's configuration."""

    part: str
    """The part of the model it belongs to."""
    learning_rate: float | None = None
    """Its highest learning rate."""
    weight_decay: float | None = None


class MuonWithAdamW:
    """torch's Muon for the matrices inside the networks, AdamW for all else, behind the face of one
    optimizer.

    Muon (Jordan et al., 2024) makes each update of a matrix orthogonal, so that rare directions are learned
    as fast as common ones. A kernel counts as the matrix (out, in * height * width): Muon gets a view of it.
    Both take the same learning rate (`adjust_lr_fn="match_rms_adamw"`; Liu et al., arXiv 2502.16982).

    Args:
        parameters: what is trained, by name.
        matrices: names of those that are Muon's; AdamW takes all else.
        rules: learning rates and decays of parameters that have their own, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: frozenset[str],
        config: StageConfig,
        rules: Mapping[str, ParameterRule] = MappingProxyType({}),
    ) -> None:
        self._parameters = dict(parameters)
        # Views share memory with the parameters, so Muon's step on a view changes the kernel itself.
        self._views = {
            name: nn.Parameter(parameters[name].detach().view(len(parameters[name]), -1))
            for name in parameters
            if name in matrices
        }
        others = {name: parameter for name, parameter in parameters.items() if name not in matrices}
        self._optimizers: list[torch.optim.Optimizer] = []
        if self._views:
            self._optimizers.append(
                torch.optim.Muon(
                    _groups(self._views, config, rules, all_decay=True),
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._optimizers.append(
                torch.optim.AdamW(
                    _groups(others, config, rules),
                    lr=config.learning_rate,
                    betas=(config.beta_1, config.beta_2),
                    eps=config.epsilon,
                )
            )
        self._names = {
            **{parameter: name for name, parameter in others.items()},
            **{view: name for name, view in self._views.items()},
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, for whoever sets learning rates."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def set_learning_rates(self, step: int, config: StageConfig) -> None:
        """Each group's learning rate of a step."""
        for group in self.param_groups:
            group["lr"] = learning_rate(step, config, group["highest_learning_rate"])

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for name, view in self._views.items():
            gradient = self._parameters[name].grad
            view.grad = None if gradient is None else gradient.reshape(view.shape)
        for optimizer in self._optimizers:
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Momenta and step counts, as `<parameter>:<key>`."""
        names: Any = self._names
        return {
            f"{names[parameter]}:{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def prepare_state(self, names: Iterable[str]) -> None:
        """Makes room for the tensors of these names, so that `tensors` can be filled from a checkpoint.

        A parameter that never got a gradient has none.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {
            parameter: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name in names:
            owner, _, key = name.rpartition(":")
            if owner in parameters:
                parameter = parameters[owner]
                room = (
                    torch.tensor(0.0, dtype=torch.float32)
                    if key == "step"
                    else torch.zeros_like(parameter.detach())
                )
                owners[parameter].state[parameter][key] = room


def _groups(
    parameters: Mapping[str, nn.Parameter],
    config: StageConfig,
    rules: Mapping[str, ParameterRule],
    *,
    all_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameters that learn alike. Matrices and kernels decay; biases, norms and gates do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rule = rules.get(name, ParameterRule(""))
        rate = config.learning_rate if rule.learning_rate is None else rule.learning_rate
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        if parameter.ndim < 2 and not all_decay:
            decay = 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "highest_learning_rate": rate}
        for (rate, decay), members in groups.items()
    ]


def learning_rate(step: int, config: StageConfig, highest: float | None = None) -> float:
    """Linear warm-up, a plateau, then a half cosine down to 0; a function of the step alone.

    Args:
        highest: the plateau; default the stage's.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = config.decay_fraction * config.steps
    left = (config.steps - step) / decay_steps if decay_steps else 1.0
    cold = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
    return (config.learning_rate if highest is None else highest) * warm * cold


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
        averages, targets = [self.tensors[n] for n in names], [parameters[n] for n in names]
        torch._foreach_lerp_(averages, targets, 1 - decay)  # pyright: ignore[reportPrivateUsage]
