"""Where a U-Net's finest maps look while it paints: how much of their weight falls on the right place.

Letters: I images, Q pixels of a map row by row, H heads, M samples, y and x latent cells.
"""

import torch
from torch import Tensor

from mm_interleaved.ops import SamplingPlan
from studies.image_detail.scenes import LATENT_SIZE, Examples

_NEAR = 0.75
"""Latent cells from the centre of a place within which a sample is on it."""


def weight_on_the_place(plan: SamplingPlan, examples: Examples) -> tuple[float, float]:
    """Of all weight of the pixels on boards (what is looked at nowhere included), the share on the same place
    of the earlier image; the mean of heads, and of the head that has most there.
    """
    place_IQ2, is_board_IQ = _places(examples)
    cells_IQHM2 = plan.location.flatten(3, 4) * LATENT_SIZE
    distance_IQHM = (cells_IQHM2 - place_IQ2[:, :, None, None]).abs().amax(-1)
    share_IQH = (plan.weight.flatten(3, 4) * (distance_IQHM < _NEAR)).sum(-1)
    by_head_H = share_IQH[is_board_IQ].mean(0)
    return float(by_head_H.mean()), float(by_head_H.max())


def places_of(examples: Examples) -> Tensor:
    """(x, y) in [0, 1] of the place of each pixel in the earlier image, (I, 1, Q, 2), NaN off the board."""
    place_IQ2, is_board_IQ = _places(examples)
    return (place_IQ2 / LATENT_SIZE).masked_fill(~is_board_IQ[..., None], torch.nan)[:, None]


def _places(examples: Examples) -> tuple[Tensor, Tensor]:
    """(x, y) in latent cells of each pixel's place on the earlier image, (I, Q, 2); whether it is on a
    board, (I, Q).
    """
    y, x = torch.meshgrid(*[torch.arange(LATENT_SIZE) + 0.5] * 2, indexing="ij")
    own_Q2 = torch.stack([x.flatten(), y.flatten()], -1)
    shift_I2 = torch.tensor([pair.shift[::-1] for pair in examples.pairs])
    return own_Q2 + shift_I2[:, None], examples.board.flatten(1) > 0
