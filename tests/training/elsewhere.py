"""A device without hardware: tensors with data of their own that refuse to meet those of the CPU.

It takes the place of a GPU in tests of what must lie where. PyTorch's fake tensors would refuse as well, but
hold no data, which `nonzero` and `tolist` need.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

ELSEWHERE = torch.device("meta")
"""How it calls itself: the one device that every build of PyTorch knows and nobody computes on."""

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class TwoDevicesError(AssertionError):
    """An operation was given tensors of both devices."""


class _Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=ELSEWHERE,
        )

    def __init__(self, inside):
        self.inside = inside

    def new_tensor(self, data):
        # PyTorch's own makes no data for this device.
        return self.inside.new_tensor(data).to(ELSEWHERE)

    def tolist(self):
        # Subclasses have none of their own.
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    leaves, form = tree_flatten((args, kwargs))
    there = {id(leaf.inside): leaf for leaf in leaves if isinstance(leaf, _Tensor)}
    # A number without dimensions may come from anywhere.
    here = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, _Tensor) and leaf.ndim
    ]
    if there and here and func not in _MOVES:
        raise TwoDevicesError(f"{func}: tensors elsewhere, and here of {[tensor.shape for tensor in here]}")
    wanted = kwargs.get("device")
    is_there = bool(there) if wanted is None else torch.device(wanted) == ELSEWHERE
    if func is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], _Tensor)
    inner = [_inside(leaf) for leaf in leaves]
    inner_args, inner_kwargs = tree_unflatten(inner, form)
    result = func(*inner_args, **inner_kwargs)

    def outside(value):
        if not isinstance(value, torch.Tensor) or not is_there:
            return value
        return there.get(id(value)) if id(value) in there else _Tensor(value)

    return tree_map(outside, result)


def _inside(leaf):
    if isinstance(leaf, torch.device) and leaf == ELSEWHERE:
        return torch.device("cpu")
    return leaf.inside if isinstance(leaf, _Tensor) else leaf


@contextmanager
def elsewhere(monkeypatch):
    """Within, `ELSEWHERE` can be computed on; numbers stay in float32 there."""
    autocast, make = torch.autocast, torch.tensor

    def made(data, *, device=None, **settings):
        # PyTorch's own makes no data for this device.
        return make(data, **settings).to(device)

    def cast(device_type, *args, **kwargs):
        is_there = device_type == ELSEWHERE.type
        return nullcontext() if is_there else autocast(device_type, *args, **kwargs)

    with _Mode(), monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", cast)
        patch.setattr(torch, "tensor", made)
        yield
