"""Whether weights may be read instead of called, and whether they are still those of before.

Libraries change a model under our hands: LoRA and quantisation put other modules in the place of linear
layers, accelerate's offloading brings weights only during a call, FSDP2 brings parts of them. Whoever reads
weights instead of calling modules asks here first.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def weights_at_hand(
    modules: Sequence[nn.Module], kinds: tuple[type, ...], device: torch.device | None = None
) -> list[Tensor] | None:
    """All parameters and buffers of modules, if reading them is the same as calling the modules; else None.

    It is not where a library has put something in the module's place or around it (LoRA, quantised layers,
    hooks), or where the weights come only during a call (offloading) or in parts (sharding).

    Args:
        kinds: what the modules must be: exactly these classes, whose `forward` is known.
        device: of what is computed with them. On the meta device, where shapes alone are computed, weights
            need no more than shapes; elsewhere a weight that is there is one that a library will bring.
    """
    is_shape_alone = device is not None and device.type == "meta"
    weights: list[Tensor] = []
    for module in modules:
        if type(module) not in kinds or "forward" in vars(module):
            return None
        if module._forward_hooks or module._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return None
        for weight in (*module._parameters.values(), *module._buffers.values()):  # pyright: ignore[reportPrivateUsage]
            if weight is None:
                continue
            if type(weight) not in (nn.Parameter, Tensor):
                return None
            if weight.device.type == "meta" and not is_shape_alone:
                return None
            weights.append(weight)
    return weights


State = tuple[int, int] | None
"""Which tensor it is and how often it was changed; None: nothing can be known of it."""


def weight_state(weight: Tensor) -> State:
    """What distinguishes a weight from another one, and from itself after a change.

    Changes of content are seen by version counters, which every change under autograd's eyes raises:
    optimizers, `load_state_dict`, `copy_`. A fused optimizer or a write through `.data` passes unseen.
    """
    if weight.device.type == "meta":
        return None
    # What a library puts in a weight's place (quantisation) may have no address of its own.
    is_plain = type(weight) in (nn.Parameter, Tensor)
    # Tensors made in inference mode are never changed in place by anyone who wants to be noticed.
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr() if is_plain else id(weight), version


class WeightsState:
    """The weights of a whole model at one time, to find out later whether what was computed still holds.

    Compared by `weight_state`. Added weights (LoRA) and other ones in their place (another device, another
    number format) are a change as well. Weights that an offloading library takes away between calls count as
    unchanged, and so do buffers, which models fill with tables while they run.
    """

    def __init__(self, model: nn.Module):
        # Kept, so that no other can have their address.
        self._weights = list(model.parameters())
        self._states = [weight_state(weight) for weight in self._weights]

    def is_that_of(self, model: nn.Module) -> bool:
        return [weight_state(weight) for weight in model.parameters()] == self._states


_versions: WeakKeyDictionary[nn.Module, tuple[WeightsState, int]] = WeakKeyDictionary()
_versions_lock = threading.Lock()
_next_version = count()


class _Steady(threading.local):
    versions: dict[int, int] | None = None


_steady = _Steady()


def weights_version(model: nn.Module) -> int:
    """A number that is another one whenever the weights of a model are others, see `WeightsState`."""
    known = _steady.versions
    if known is not None and id(model) in known:
        return known[id(model)]
    with _versions_lock:
        state, version = _versions.get(model, (None, -1))
        if state is None or not state.is_that_of(model):
            version = next(_next_version)
            _versions[model] = WeightsState(model), version
    if known is not None:
        known[id(model)] = version
    return version


@contextmanager
def steady_weights() -> Generator[None, None, None]:
    """Within, nobody changes the weights of a model that this thread computes with: they are looked at once.

    To look at all of the shipped model's takes 5 ms, as long as half a token.
    """
    outer = _steady.versions
    _steady.versions = {} if outer is None else outer
    try:
        yield
    finally:
        _steady.versions = outer


class FoldingCache:
    """Keeps what was folded, for as long as the weights are the same ones with the same content.

    What passes `weight_state` unseen shows with the next images: values get a cache of their own.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[list[Tensor], list[State], Any]] = {}

    def last(self, key: Any) -> Any:
        """What was kept last for this key, or None; for compiled code, which cannot inspect weights."""
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
        state = [weight_state(weight) for weight in weights]
        kept = self._kept.get(key)
        if kept is None or kept[1] != state:
            # Inside no autograd, autocast or inference mode, so that the result serves in any of them.
            device_type = weights[0].device.type
            # Which autocast does not know.
            device_type = "cpu" if device_type == "meta" else device_type
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device_type, enabled=False),
            ):
                # The weights are kept too: as long as they live, no other can have their address.
                kept = self._kept[key] = (weights, state, fold())
        return kept[2]
