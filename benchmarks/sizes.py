"""Published sizes, and modules of those sizes with random weights that all matter.

Letters as in `textbook.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.synchronizer import FeatureSynchronizer

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class SynchronizerSize:
    """The numbers of one synchronizer."""

    query_dim: int
    feature_dim: int
    value_dim: int
    num_heads: int
    num_points: int
    level_sizes: tuple[int, ...]
    max_images: int
    base_size: float

    @property
    def cells(self) -> int:
        """Of all levels of an image."""
        return sum(size * size for size in self.level_sizes)

    @property
    def head_dim(self) -> int:
        return self.value_dim // self.num_heads

    @property
    def terms(self) -> int:
        """Offsets and logits of all heads that are ever used."""
        return self.num_heads * self.num_points * (2 + len(self.level_sizes))

    @property
    def samples(self) -> int:
        """Of a query in an image, all heads."""
        return self.num_heads * self.num_points * len(self.level_sizes)


LANGUAGE = SynchronizerSize(
    query_dim=5120,
    feature_dim=1024,
    value_dim=1024,
    num_heads=16,
    num_points=8,
    level_sizes=(32, 16, 8),
    max_images=50,
    base_size=16,
)
"""A layer of the released 13-billion language model."""

UNET_LEVELS = (64, 32, 16, 8)
"""Of the pyramid that the released U-Net attends to."""


def unet_map(channels: int, base_size: float) -> SynchronizerSize:
    """A map of the released U-Net: 320, 640 or 1280 channels on 64, 32, 16 or 8 cells."""
    return SynchronizerSize(
        query_dim=channels,
        feature_dim=1024,
        value_dim=1024,
        num_heads=16,
        num_points=8,
        level_sizes=UNET_LEVELS,
        max_images=10,
        base_size=base_size,
    )


def feature_synchronizer(size: SynchronizerSize) -> FeatureSynchronizer:
    """Of that size, untouched."""
    return FeatureSynchronizer(
        size.query_dim,
        size.feature_dim,
        value_dim=size.value_dim,
        num_heads=size.num_heads,
        num_levels=len(size.level_sizes),
        num_points=size.num_points,
        max_images=size.max_images,
        base_size=size.base_size,
    )


def gated_synchronizer(
    size: SynchronizerSize, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> GatedSynchronizer:
    """A language-model layer's synchronizer with random weights, see `fill_parameters`."""
    return random_module(
        lambda: GatedSynchronizer(feature_synchronizer(size), size.query_dim, size.feature_dim),
        device,
        dtype,
        seed,
    )


def random_module(
    build: Callable[[], Module], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Module:
    """A module in evaluation mode whose parameters are all random; nothing is initialised twice."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval()
    for buffer in module.buffers():
        buffer.normal_() if buffer.is_floating_point() else buffer.zero_()
    fill_parameters(module, device, seed)
    return module


def fill_parameters(module: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Random values for every parameter of a module; buffers stay."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        _fill(name, parameter.data, generator)


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Matrices keep the size of what they multiply; norms and gates stay near what they start at."""
    if name.endswith("sampling_offsets.bias"):
        tensor.uniform_(-3, 3, generator=generator)
    elif name.endswith("gate"):
        tensor.fill_(0.5)
    elif "norm" in name and name.endswith("weight"):
        tensor.normal_(generator=generator).mul_(0.1).add_(1)
    elif tensor.dim() >= 2:
        fan_in = tensor[0].numel()
        tensor.normal_(generator=generator).mul_(fan_in**-0.5)
    else:
        tensor.normal_(generator=generator).mul_(0.1)


def causal_visibility(num_queries: int, num_images: int, device: torch.device) -> Tensor:
    """Images spread evenly over a row of queries, each visible from where it stands: (1, Q, N) bool."""
    position = torch.arange(num_queries, device=device)[:, None]
    start = torch.arange(num_images, device=device)[None] * num_queries // max(1, num_images)
    return (start < position)[None]


def packed_visibility(num_queries: int, num_images: int, documents: int, device: torch.device) -> Tensor:
    """The same for several documents in one row, which do not see each other's images."""
    same = (
        torch.arange(num_queries, device=device)[:, None] * documents // num_queries
        == torch.arange(num_images, device=device)[None] * documents // num_images
    )
    return causal_visibility(num_queries, num_images, device) & same[None]
