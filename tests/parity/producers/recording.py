"""What passes through a model's parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, Any]]:
    """Outputs of modules while they run: `record["name"]` is the last output, `record["name.in"]` the first
    input.
    """
    record: dict[str, Any] = {}

    def keep(name):
        def hook(module, arguments, keywords, output):
            record[f"{name}.in"] = arguments[0] if arguments else keywords["hidden_states"]
            record[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
