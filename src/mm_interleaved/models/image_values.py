"""What is sampled of images: projected feature pyramids, flattened to cells.

Letters: B rows, N images, J images that there are values of, H heads, S cells an image, C feature channels, d
channels a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.models.weights_at_hand import FoldingCache


class ImageValues(NamedTuple):
    """What is sampled, of images; it depends on the images alone, so keep it.

    `value`: (B, N, S, H, d), projected features. With `image_BN`, of J images under any leading axes, and
    `image_BN` (B, N) int64 says which stands where (row-major count; anything for a hidden image), so that
    rows share images without a copy. `level_sizes`: width and height of each square level, largest first.
    `is_projected`: False if `value` is (..., S, 1, C + 2), features that all heads and layers share and that
    are projected after sampling, see `folding.features_to_sample`. `folded`: what `folding` keeps beside
    them; None: it keeps nothing.
    """

    value: Tensor
    level_sizes: tuple[int, ...]
    image_BN: Tensor | None = None  # noqa: N815
    is_projected: bool = True
    folded: FoldingCache | None = None


def flatten_pyramid(maps: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Square maps (..., C, s, s), largest first, as cells (..., S, C) and their sizes.

    Raises:
        ValueError: a map is not square.
    """
    for level_map in maps:
        if level_map.shape[-1] != level_map.shape[-2]:
            raise ValueError(f"feature maps must be square, got {tuple(level_map.shape)}")
    cells = [level_map.flatten(-2).transpose(-1, -2) for level_map in maps]
    return torch.cat(cells, dim=-2), tuple(level_map.shape[-1] for level_map in maps)


def check_levels(level_sizes: Sequence[int], num_levels: int) -> None:
    """A pyramid has as many levels as a synchronizer samples.

    Raises:
        ValueError: it has not.
    """
    if len(level_sizes) != num_levels:
        raise ValueError(f"this synchronizer samples {num_levels} levels, found {len(level_sizes)}")
