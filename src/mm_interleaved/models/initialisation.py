"""How our own modules get their first weights inside transformers' models.

transformers initialises what a checkpoint lacks through `_init_weights` of the nearest `PreTrainedModel`,
which knows nothing of our modules, and passes over modules of other packages that hold no parameter
themselves. So our modules say how they start in `reset_parameters`, with `transformers.initialization`, which
leaves loaded tensors alone.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PACKAGE = "mm_interleaved."


class OwnInitialisation(PreTrainedModel if TYPE_CHECKING else object):
    """Mix-in for a `PreTrainedModel`: after transformers' own rules, ours, children first."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in reversed(list(self.modules())):
            reset = getattr(type(module), "reset_parameters", None)
            # A rule inherited from torch (ours may be a linear layer too) would overwrite what was loaded.
            if reset is not None and reset.__module__.startswith(PACKAGE) and module is not self:
                reset(module)


def is_own(module: nn.Module) -> bool:
    """Whether a module is of this package."""
    return type(module).__module__.startswith(PACKAGE)


def is_loaded(tensor: object) -> bool:
    """Whether a tensor came from a checkpoint, so that it must not be initialised (transformers' mark)."""
    return getattr(tensor, "_is_hf_initialized", False)
