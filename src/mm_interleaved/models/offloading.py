"""Weights that a library takes away between calls (accelerate's offloading) or spreads (FSDP2).

Such libraries bring a module's weights before its `forward` and take them away behind it. Whatever is read of
a module at another time is read through here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def value_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, at any time; gradients reach it where it is not offloaded.

    Args:
        module: its owner.
        name: as an attribute of the owner.

    A module that is on the meta device as a whole computes shapes there.

    Raises:
        ValueError: this one is nowhere: on the meta device beside others that are not, and no hook brings it.
    """
    value = getattr(module, name)
    if isinstance(value, DTensor):
        return value.full_tensor()
    if value.device.type != "meta":
        return value
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
        try:
            value = getattr(module, name)
        finally:
            hook.post_forward(module, None)
    if value.device.type == "meta" and any(each.device.type != "meta" for each in module.parameters()):
        raise ValueError(
            f"{name} of {type(module).__name__} is on the meta device and nothing brings it from the disk; "
            "give it a place of its own in device_map, such as 'cpu'"
        )
    return value


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate computes a module whose weights it moves; None where it does not."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
