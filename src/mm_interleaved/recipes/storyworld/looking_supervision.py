"""Looking supervision: where an image decoder has to look in earlier images, out of the truth of the world.

Where a board or a figure comes back elsewhere, nothing but the slope of what is sampled moves an offset, and
over random cells that leads nowhere further off than one cell. The world knows where each thing was.
Letters: I images, K earlier images each may look at, Q cells of a map row by row, H heads, M samples of an
image.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mm_interleaved.documents.document import Document
from mm_interleaved.models.image_decoder import ImageDecoder
from mm_interleaved.models.unet import MapSynchronizer, skip_channels
from mm_interleaved.ops import SamplingPlan
from mm_interleaved.recipes.storyworld.board_supervision import boards_of, is_map
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.detail.rendering import board_slices
from mm_interleaved.storyworld.renderer import POSITION_X, figure_box
from mm_interleaved.storyworld.sprites import LIFT
from mm_interleaved.storyworld.world import Character, Figure, scene_from_record

_REACH = 2.0
"""Cells of a map: how far from its place a sample counts as half there."""


def places_before(document: Document, number: int, before: int, size: int) -> Tensor:
    """For each of `size` by `size` cells over image `number` of a document, where what it lies on is in image
    `before`: (Q, 2) of (x, y) in [0, 1], NaN where that is not there or is no board or figure.
    """
    places = torch.full((size, size, 2), torch.nan)
    records = document.meta.get("scenes", ())
    if max(number, before) >= len(records) or any(_is_map(document, n) for n in (number, before)):
        return places.flatten(0, 1)
    axis = (torch.arange(size) + 0.5) * IMAGE_SIZE / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    now, then = boards_of(document)[number], boards_of(document)[before]
    if now is not None and then is not None and now.cells == then.cells:
        _, columns = board_slices(now)
        (left, top), (old_left, old_top) = now.corner, then.corner
        side, old_columns = columns.stop - columns.start, board_slices(then)[1]
        is_on = (x >= left) & (x < left + side) & (y >= top) & (y < top + side)
        scale = (old_columns.stop - old_columns.start) / side
        there = torch.stack([old_left + (x - left) * scale, old_top + (y - top) * scale], -1)
        places[is_on] = there[is_on] / IMAGE_SIZE
    stood = {_known_by(figure.character): figure for figure in scene_from_record(records[before]).figures}
    for figure in scene_from_record(records[number]).figures:
        if (old := stood.get(_known_by(figure.character))) is not None:
            _place_figure(places, figure, old, x, y)
    return places.flatten(0, 1)


def _is_map(document: Document, number: int) -> bool:
    return is_map(document, number) or (document.meta.get("task") == "segmentation" and number == 0)


def _known_by(character: Character) -> tuple[str, str, str]:
    """What makes somebody the same: a hat may change."""
    return character.name, character.species, character.body_colour


def _place_figure(places: Tensor, figure: Figure, old: Figure, x: Tensor, y: Tensor) -> None:
    """Writes where the cells of a figure were, in place."""
    left, top, right, bottom = figure_box(figure)
    is_on = (x >= left) & (x < right + 1) & (y >= top) & (y < bottom + 1)
    across = POSITION_X[old.position] - POSITION_X[figure.position]
    there = torch.stack([x + across, y + LIFT[old.action] - LIFT[figure.action]], -1)
    places[is_on] = there[is_on] / IMAGE_SIZE


def finest_maps(decoder: ImageDecoder) -> list[MapSynchronizer]:
    """The synchronizers of the skips that are as fine as the latents; the last knows the conditioning."""
    if decoder.synchronizers is None:
        return []
    depths = [depth for _, depth in skip_channels(decoder.unet)]
    return [
        block
        for block, depth in zip(decoder.synchronizers.skips, depths, strict=True)
        if depth == 0 and isinstance(block, MapSynchronizer)
    ]


@contextmanager
def recorded_plans(blocks: Sequence[MapSynchronizer]) -> Generator[list[SamplingPlan]]:
    """Within, each call of these adds its plan to the list: one row for each image that sees any."""
    plans: list[SamplingPlan] = []

    def record(called: Any, arguments: tuple[Any, ...]) -> None:
        map_IXyx, _, relative_index_IK = arguments
        if relative_index_IK.shape[-1]:
            plans.append(called.plan(map_IXyx, relative_index_IK))

    handles = [block.register_forward_pre_hook(record) for block in blocks]
    try:
        yield plans
    finally:
        for handle in handles:
            handle.remove()


def looking_loss(plan: SamplingPlan, place_IKQ2: Tensor) -> Tensor:
    """How far cells look from where they should, a scalar: the mean over cells with a place, and heads, of
    -log Σ α exp(-d² / 2 r²), α the weights, d the distances of samples in cells of the map, r the reach.

    The logarithm of a sum is ruled by the nearest samples, however far they are: its gradient leads to the
    place over any distance, and then from all other samples to those.

    Args:
        place_IKQ2: (x, y) in [0, 1] of the place in each earlier image, NaN where it is not there.
    """
    location_IQHKM2 = plan.location.unflatten(3, (place_IKQ2.shape[1], -1)).flatten(4, 5).float()
    weight_IQHKM = plan.weight.unflatten(3, (place_IKQ2.shape[1], -1)).flatten(4).float()
    is_there_IQK = ~place_IKQ2.isnan().any(-1).transpose(1, 2)
    place_IQK2 = place_IKQ2.nan_to_num().transpose(1, 2)
    size = place_IKQ2.shape[2] ** 0.5
    distance_IQHKM = (size * (location_IQHKM2 - place_IQK2[:, :, None, :, None])).square().sum(-1)
    log_share = weight_IQHKM.clamp(min=1e-12).log() - distance_IQHKM / (2 * _REACH**2)
    # A large finite number instead of infinity, whose gradient would be no number where no image has a place.
    log_share = log_share.masked_fill(~is_there_IQK[:, :, None, :, None], -1e4)
    loss_IQH = -log_share.flatten(3).logsumexp(-1)
    counts_IQ1 = is_there_IQK.any(-1, keepdim=True).to(loss_IQH.dtype)
    return (loss_IQH * counts_IQ1).sum() / (counts_IQ1.sum() * loss_IQH.shape[-1]).clamp(min=1)
