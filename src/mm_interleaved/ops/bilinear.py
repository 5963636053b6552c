"""Where a sample falls: its four cells and their shares, bilinear, zero outside the map; and back.

A cell's share of a sample at distance t along one axis is the hat max(0, 1 - |t|). The first cell is moved
onto the map where it would leave it; the hats then give both cells of an axis their right shares, mostly
none, so that no mask is needed.
Axes of two (x and y, first and second cell) are written out or stand first: a last axis of two costs ten
times the arithmetic.
Letters: n pairs of a query and an image (or pyramid), j samples of a pair and head (L * P); the others as in
`attention.py`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """What is to be known of the levels, for each of the j samples of a pair and head.

    `size`, `last_low`, `start`: (j,), cells along one side, the greatest first cell along one side, and the
    cells of all larger levels. `steps`: (4, j) int32, from the first of a sample's four cells to each of them
    ((y, x) row-major), in cells. `has_second`: (j,) bool, whether there is more than one; None if always.
    """

    size: Tensor
    last_low: Tensor
    start: Tensor
    steps: Tensor
    has_second: Tensor | None


def level_table(
    level_sizes: tuple[int, ...], num_points: int, dtype: torch.dtype, device: torch.device
) -> Levels:
    """The same for every call with the same sizes; made in two transfers to the device."""
    numbers_3j, steps_4j = _level_numbers(level_sizes, num_points)
    size, last_low, start = torch.tensor(numbers_3j, dtype=dtype, device=device).unbind()
    steps = torch.tensor(steps_4j, dtype=torch.int32, device=device)
    return Levels(size, last_low, start, steps, has_second=size > 1 if 1 in level_sizes else None)


@lru_cache(maxsize=32)
def _level_numbers(
    level_sizes: tuple[int, ...], num_points: int
) -> tuple[list[list[float]], list[list[int]]]:
    # Numbers, not tensors: those of one mode (inference, compilation) would not serve in another.
    numbers, steps, start = [], [], 0
    for size in level_sizes:
        numbers += [[size, max(size - 2, 0), start]] * num_points
        steps += [[0, 1, size, size + 1] if size > 1 else [0] * 4] * num_points
        start += size * size
    return [list(row) for row in zip(*numbers, strict=True)], [list(row) for row in zip(*steps, strict=True)]


class BilinearTerms(NamedTuple):
    """Of samples (n, H, j); along x and along y, first axis of all but `cell`.

    `cell`: int32, the first of the four cells, counted through all levels. `distance`: of the sample from
    the first cell. `near`, `far`: shares of the first and the second cell.
    """

    cell: Tensor
    distance: Tensor
    near: Tensor
    far: Tensor


def bilinear_terms(place_2nHj: Tensor, levels: Levels) -> BilinearTerms:
    """The cells of samples at (x, y), in cells of their level; the centre of cell i lies at i."""
    low = torch.minimum(place_2nHj.floor().clamp_(min=0), levels.last_low)
    # A place that is no number gets a cell all the same; its shares are no numbers either.
    cell = torch.addcmul(levels.start, low[1], levels.size).add_(low[0]).int().clamp_(min=0)
    distance = place_2nHj - low
    near = torch.rsub(distance.abs(), 1).clamp_(min=0)
    far = torch.rsub((distance - 1).abs_(), 1).clamp_(min=0)
    if levels.has_second is not None:
        far.mul_(levels.has_second)
    return BilinearTerms(cell, distance, near, far)


def bilinear_weights(bilinear: BilinearTerms, weight_nHj: Tensor) -> Tensor:
    """What each of the four cells weighs, in the order of `Levels.steps`: (n, H, 4, j)."""
    n, H, j = weight_nHj.shape
    out_nH4j = weight_nHj.new_empty(n, H, 4, j)
    upper, lower = weight_nHj * bilinear.near[1], weight_nHj * bilinear.far[1]
    for cell, (y, x) in enumerate(
        ((upper, bilinear.near), (upper, bilinear.far), (lower, bilinear.near), (lower, bilinear.far))
    ):
        torch.mul(y, x[0], out=out_nH4j[:, :, cell])
    return out_nH4j


def bilinear_gradients(
    bilinear: BilinearTerms, gradient_nH4j: Tensor, weight_nHj: Tensor, levels: Levels
) -> tuple[Tensor, Tensor]:
    """Of the samples' weights, (n, H, j), and places, (2, n, H, j), from that of `bilinear_weights`."""
    near, far = bilinear.near, bilinear.far
    upper_left, upper_right, lower_left, lower_right = gradient_nH4j.unbind(2)
    # 1. Of the four shares, two along x, two along y.
    of_near, of_far = torch.empty_like(near), torch.empty_like(far)
    torch.addcmul(upper_left * near[1], lower_left, far[1], out=of_near[0])
    torch.addcmul(upper_right * near[1], lower_right, far[1], out=of_far[0])
    torch.addcmul(upper_left * near[0], upper_right, far[0], out=of_near[1])
    torch.addcmul(lower_left * near[0], lower_right, far[0], out=of_far[1])
    of_weight = torch.addcmul(of_near[0] * near[0], of_far[0], far[0])
    if levels.has_second is not None:
        of_far.mul_(levels.has_second)
    # 2. A hat rises over [-1, 0) and falls over [0, 1), as for whoever takes the floor of a place: between
    # both cells the far one gains what the near one loses.
    whole = bilinear.distance.floor()
    outside = torch.where(whole == -1, of_near, (whole == 1).to(far.dtype).mul_(of_far).neg_())
    of_place = torch.where(whole == 0, of_far.sub_(of_near), outside)
    return of_weight, of_place.mul_(weight_nHj)
