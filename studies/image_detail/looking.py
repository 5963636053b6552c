"""Where a U-Net's finest maps look while it paints: how much of their weight falls on the right place.

Letters: I images, Q pixels of a map row by row, H heads, M samples, y and x latent cells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.ops import SamplingPlan
from studies.image_detail.scenes import LATENT_SIZE, Examples

_NEAR = 0.75
"""Latent cells from the centre of a place within which a sample is on it."""


@contextmanager
def recorded_plans(decoder: ImageDecoder) -> Iterator[list[SamplingPlan]]:
    """Within, the plans of synchronizers whose maps are as fine as the latents are added to the list."""
    plans: list[SamplingPlan] = []
    handles = []

    def record(called: Any, arguments: tuple) -> None:
        map_IXyx, _, relative_index_IK = arguments
        if map_IXyx.shape[-1] == LATENT_SIZE and relative_index_IK.shape[-1]:
            with torch.no_grad():
                plans.append(called.plan(map_IXyx, relative_index_IK))

    for block in [] if decoder.synchronizers is None else decoder.synchronizers.skips:
        handles.append(block.register_forward_pre_hook(record))
    try:
        yield plans
    finally:
        for handle in handles:
            handle.remove()


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


def _places(examples: Examples) -> tuple[Tensor, Tensor]:
    """(x, y) in latent cells of each pixel's place on the earlier image, (I, Q, 2); whether it is on a
    board, (I, Q).
    """
    y, x = torch.meshgrid(*[torch.arange(LATENT_SIZE) + 0.5] * 2, indexing="ij")
    own_Q2 = torch.stack([x.flatten(), y.flatten()], -1)
    shift_I2 = torch.tensor([pair.shift[::-1] for pair in examples.pairs])
    return own_Q2 + shift_I2[:, None], examples.board.flatten(1) > 0
