"""Weights multiplied together once, so that each query pays for one small matrix instead of two large ones.

What a synchronizer computes before and after its sampling is linear (reference/performance.md, E2 and E3):
    offsets and logits = W (D q + d + r_k) + b  =  M q + c + T_k,   M = W D,  c = W d + b,  T = R W^T
so that M takes the place of D; the scale of a norm, a position table, a gate and a convolution fold as well.
Folded tables live with the projected images they are used with (`ImageValues.folded`): one session, one
picture. They are made anew when a weight has changed, and never where weights are not simply there: under
quantisation, LoRA, offloading and sharding the modules are called as they are.
Letters: D query channels, H heads, E terms a head, K rows of the relative-index table, X channels out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)


def weights_at_hand(modules: Sequence[nn.Module], kinds: tuple[type, ...]) -> list[Tensor] | None:
    """All parameters and buffers of modules, if reading them is the same as calling the modules; else None.

    It is not where a library has put something in the module's place or around it (LoRA, quantised layers,
    hooks), or where the weights come only during a call (offloading) or in parts (sharding).
    """
    weights = []
    for module in modules:
        if type(module) not in kinds or "forward" in vars(module):
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        for weight in (*module._parameters.values(), *module._buffers.values()):
            if weight is None:
                continue
            if type(weight) not in (nn.Parameter, Tensor) or weight.device.type == "meta":
                return None
            weights.append(weight)
    return weights


class FoldedOnce:
    """Keeps what was folded, for as long as the weights are the same ones with the same content.

    Content is told by version counters, which every change under autograd's eyes raises: optimizers,
    `load_state_dict`, `copy_`. A fused optimizer or a write through `.data` passes unseen: what is projected
    afterwards starts over in any case, since it gets a `FoldedOnce` of its own.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[list[Tensor], list[tuple[int, int] | None], Any]] = {}

    def last(self, key: Any) -> Any:
        """What was kept last for this key, or None; for compiled code, which cannot look at weights."""
        return self._kept[key][2] if key in self._kept else None

    def tensors(self) -> list[Tensor]:
        """All that is kept, of tables that are dataclasses of tensors and of such tables."""
        tables, found = [kept[2] for kept in self._kept.values()], []
        for table in tables:
            values = [getattr(table, place.name) for place in fields(table)]
            found += [value for value in values if isinstance(value, Tensor)]
            tables += [value for value in values if is_dataclass(value)]
        return found

    def get(self, key: Any, weights: list[Tensor], fold: Callable[[], Any]) -> Any:
        """`fold()`, or what it returned for this key before."""
        state = [_state(weight) for weight in weights]
        kept = self._kept.get(key)
        if kept is None or kept[1] != state:
            # Inside no autograd, autocast or inference mode, so that the result serves in any of them.
            device_type = weights[0].device.type
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device_type, enabled=False),
            ):
                # The weights are kept too: as long as they live, no other can have their address.
                kept = self._kept[key] = (weights, state, fold())
        return kept[2]


class WeightsState:
    """The weights of a whole model at one time, to tell later whether what was computed still holds.

    Told as in `FoldedOnce`. Added weights (LoRA) and other ones in their place (another device, another
    number format) are a change as well. Weights that an offloading library takes away between calls count as
    unchanged, and so do buffers, which models fill with tables while they run.
    """

    def __init__(self, model: nn.Module):
        # Kept, so that no other can have their address.
        self._weights = list(model.parameters())
        self._states = [_state(weight) for weight in self._weights]

    def is_that_of(self, model: nn.Module) -> bool:
        return [_state(weight) for weight in model.parameters()] == self._states


def _state(weight: Tensor) -> tuple[int, int] | None:
    if weight.device.type == "meta":
        return None
    # What a library puts in a weight's place (quantisation) may have no address of its own.
    is_plain = type(weight) in (nn.Parameter, Tensor)
    return weight.data_ptr() if is_plain else id(weight), _version(weight)


def _version(weight: Tensor) -> int:
    # Tensors made in inference mode are never changed in place by anyone who wants to be noticed.
    return -1 if weight.is_inference() else weight._version


@dataclass(frozen=True, slots=True)
class FoldedTerms:
    """Offsets and logits straight from a query: `weight` (H * E, D), `bias` (H * E,) or (Q, H * E) with a
    position table, `index` (K, H, E).
    """

    weight: Tensor
    bias: Tensor
    index: Tensor

    def of(self, query_BQD: Tensor) -> Tensor:
        """(B, Q, H, E), single precision or better."""
        if self.bias.ndim == 1 and self.bias.dtype == query_BQD.dtype:
            term = F.linear(query_BQD, self.weight, self.bias).to(self.bias.dtype)
        else:
            term = F.linear(query_BQD, self.weight).to(self.bias.dtype) + self.bias
        return term.unflatten(-1, self.index.shape[1:])


def fold_terms(
    query_weight: Tensor,
    query_bias: Tensor,
    index_embedding_KD: Tensor,
    term_weight: Tensor,
    term_bias: Tensor,
    num_heads: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> FoldedTerms:
    """Fold in single precision or better; the matrix is kept in the precision of the weights.

    Args:
        query_weight, query_bias: D and d, (D, D) and (D,).
        term_weight, term_bias: W and b, (H * E, D) and (H * E,).
        scale, shift: the query is `scale * x + shift` of what will be given; shift (D,) or (Q, D).
    """
    exact = torch.promote_types(query_weight.dtype, torch.float32)
    term_weight = term_weight.to(exact)
    weight = term_weight @ query_weight.to(exact)
    bias = torch.addmv(term_bias.to(exact), term_weight, query_bias.to(exact))
    index = F.linear(index_embedding_KD.to(exact), term_weight).unflatten(-1, (num_heads, -1))
    if shift is not None:
        bias = bias + F.linear(shift.to(exact), weight)
    if scale is not None:
        weight = weight * scale.to(exact)
    return FoldedTerms(weight.to(query_weight.dtype), bias, index)


def fold_linear(first: nn.Linear, second_weight: Tensor, second_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `second(first(x))`."""
    exact = torch.promote_types(first.weight.dtype, torch.float32)
    second = second_weight.to(exact)
    weight = second @ first.weight.to(exact)
    bias = torch.addmv(second_bias.to(exact), second, first.bias.to(exact))
    return weight.to(first.weight.dtype), bias.to(first.weight.dtype)
