"""The optimizers, their learning-rate schedule, and averaged weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm_interleaved.training.settings import StageConfig

_ENDS = ("conv_in", "conv_out", "text_head", "patch_embedding")
"""Layers between a network and what goes in or comes out of it."""


class MuonWithAdamW:
    """torch's Muon for the matrices inside the networks, AdamW for all else, behind the face of one
    optimizer.

    Muon (Jordan et al., 2024) makes each update of a matrix orthogonal, so that rare directions are learned
    as fast as common ones. A kernel counts as the matrix (out, in * height * width): Muon gets a view of it.
    Both take the same learning rate (`adjust_lr_fn="match_rms_adamw"`; Liu et al., arXiv 2502.16982).

    Args:
        parameters: what is trained, by name.
        matrices: names of those that are Muon's, see `inner_matrices`.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], matrices: frozenset[str], config: StageConfig
    ) -> None:
        self._parameters = dict(parameters)
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
                    list(self._views.values()),
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._optimizers.append(_adamw(others, config))
        self._names = {
            **{parameter: name for name, parameter in others.items()},
            **{view: name for name, view in self._views.items()},
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, for whoever sets learning rates."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

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
        return {
            f"{self._names[parameter]}:{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` took out; a parameter that never got a gradient has nothing."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition(":")
            found.setdefault(parameter, {})[key] = tensor
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if self._names[parameter] in found:
                        optimizer.state[parameter] = found[self._names[parameter]]


def inner_matrices(parts: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the weights that are Muon's: of linear layers and convolutions that are not at a network's
    ends.
    """
    return frozenset(
        name
        for part, module in parts.items()
        for layer_name, layer in module.named_modules(prefix=part)
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and not any(end in (name := f"{layer_name}.weight") for end in _ENDS)
    )


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], parts: Mapping[str, nn.Module], config: StageConfig
) -> MuonWithAdamW:
    """The optimizer that the configuration names, for the trained parameters of a stage's parts."""
    matrices = inner_matrices(parts) if config.optimizer == "muon" else frozenset()
    return MuonWithAdamW(parameters, matrices, config)


def _adamw(parameters: Mapping[str, nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels, not on biases, norms and gates."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
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
