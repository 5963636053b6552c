"""Attention maps: where synchronizers sample earlier images for a word, or for a place of a new image.

    watch_calls -> calls for words and for maps -> the samples of one word, or of one place of a new image
                 -> how much of their weight falls where on each earlier image

Letters: B rows, Q queries (tokens, or pixels of a U-Net map row by row), N earlier images, M samples.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.ops import SamplingPlan

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of an image's sides, 0 to 1."""


@dataclass(frozen=True, slots=True)
class SynchronizerCall:
    """One call of one synchronizer: where all its queries sampled."""

    place: str
    """Whose call: "layer 2" of the language model, "skip 3" or "middle" of the U-Net."""
    plan: SamplingPlan
    level_sizes: tuple[int, ...]
    """Cells along one side of each level that was sampled."""
    map_size: tuple[int, int] | None
    """Rows and columns of the U-Net's map; None where the queries are tokens."""

    @property
    def num_images(self) -> int:
        return self.plan.weight.shape[3] // len(self.level_sizes)


class Samples(NamedTuple):
    """Samples of one earlier image: `location` (M, 2), (x, y) from 0 to 1; `weight` (M,), the share of all
    attention; `cell` (M,), the width of a cell of the level that was sampled, the image's being 1.
    """

    location: Tensor
    weight: Tensor
    cell: Tensor


@contextmanager
def watch_calls(
    model: MMInterleavedForConditionalGeneration, use: Callable[[SynchronizerCall], None]
) -> Generator[None, None, None]:
    """Within, each call of a synchronizer of the model by this thread is handed to `use`.

    Nothing that the model computes changes, to the bit: PyTorch shows what a synchronizer is about to be
    given, and its own `plan` computes where it samples. It is shown for all modules at once: a hook on the
    synchronizer itself would keep it from its shortcuts (`weights_at_hand`), whose last bits are others.
    Outside, there is nothing of it.
    """
    places = {id(module): place for place, module in _synchronizers(model)}
    thread = threading.get_ident()

    def record(called: nn.Module, given: Any) -> None:
        place = places.get(id(called))
        if place is None or threading.get_ident() != thread:
            return
        queries, values, relative_index = given
        if relative_index.shape[-1]:
            use(_call(place, called, queries, values, relative_index))

    handle = register_module_forward_pre_hook(record)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_calls(
    model: MMInterleavedForConditionalGeneration,
) -> Generator[list[SynchronizerCall], None, None]:
    """Within, each call of a synchronizer of the model is added to the list; see `watch_calls`."""
    calls: list[SynchronizerCall] = []
    with watch_calls(model, calls.append):
        yield calls


def _synchronizers(model: MMInterleavedForConditionalGeneration) -> Iterator[tuple[str, Any]]:
    for index in model.language_model.synchronized_layers:
        yield f"layer {index}", model.language_model.layers[index].synchronizer
    maps = None if model.image_decoder is None else model.image_decoder.synchronizers
    if maps is not None:
        for index, skip in enumerate(maps.skips):
            yield f"skip {index}", skip
        yield "middle", maps.middle


@torch.no_grad()
def _call(
    place: str, called: Any, queries: Tensor, values: ImageValues, relative_index: Tensor
) -> SynchronizerCall:
    map_size = (int(queries.shape[2]), int(queries.shape[3])) if queries.ndim == 4 else None
    # Kept on the CPU: little of it is needed later, and a GPU's memory is scarce.
    plan = SamplingPlan(*(part.cpu() for part in called.plan(queries, relative_index)))
    return SynchronizerCall(place, plan, values.level_sizes, map_size)


def by_head(call: SynchronizerCall) -> list[SynchronizerCall]:
    """The same call, once for each head: heads search for different things, and their mean hides it."""
    location, weight, ignore = call.plan
    return [
        replace(
            call,
            place=f"{call.place}, head {head}",
            plan=SamplingPlan(*(part[:, :, head : head + 1] for part in (location, weight, ignore))),
        )
        for head in range(weight.shape[2])
    ]


def samples_of_token(calls: Sequence[SynchronizerCall], position: int) -> list[Samples]:
    """Where one token of the only row sampled each image; the mean of its layers and their heads.

    Args:
        calls: of one pass over the whole document.
        position: of the token, from 0.
    """
    chosen = [call for call in calls if call.map_size is None]
    return _samples([(call, [position]) for call in chosen])


def samples_of_place(calls: Sequence[SynchronizerCall], box: Box, min_size: int) -> list[Samples]:
    """Where a place of the image being generated sampled each earlier image; the mean of all denoising steps,
    maps and heads. Of several images generated at once (guidance) the last counts.

    Args:
        box: the place. On each map it is the cells whose centres it holds, or the one at its own centre.
        min_size: maps of fewer cells a side do not count; their cells hold much more than the place.
    """
    chosen = [call for call in calls if call.map_size is not None and min(call.map_size) >= min_size]
    return _samples([(call, cells_in(box, call.map_size)) for call in chosen if call.map_size is not None])


def cells_in(box: Box, map_size: tuple[int, int]) -> list[int]:
    """Indices, row by row, of the cells whose centres lie in a box; the one at its centre if none does."""
    height, width = map_size
    left, top, right, bottom = box
    found = [
        y * width + x
        for y in range(height)
        for x in range(width)
        if left <= (x + 0.5) / width < right and top <= (y + 0.5) / height < bottom
    ]
    centre = int((top + bottom) / 2 * height) * width + int((left + right) / 2 * width)
    return found or [centre]


def _samples(queries: Sequence[tuple[SynchronizerCall, list[int]]]) -> list[Samples]:
    if not queries:
        return []
    num_images = max(call.num_images for call, _ in queries)
    found: list[list[Samples]] = [[] for _ in range(num_images)]
    for call, indices in queries:
        location = call.plan.location[-1, indices]
        weight = call.plan.weight[-1, indices] / (location.shape[0] * location.shape[1] * len(queries))
        num_levels = len(call.level_sizes)
        for image in range(call.num_images):
            levels = slice(image * num_levels, (image + 1) * num_levels)
            cell = torch.tensor([1 / size for size in call.level_sizes])[None, None, :, None]
            found[image].append(
                Samples(
                    location[:, :, levels].reshape(-1, 2).float(),
                    weight[:, :, levels].reshape(-1).float(),
                    cell.expand_as(weight[:, :, levels]).reshape(-1),
                )
            )
    return [Samples(*(torch.cat(column) for column in zip(*parts, strict=True))) for parts in found]


def heat_map(samples: Samples, size: int) -> Tensor:
    """How much each of `size` by `size` pixels of an image weighed: (size, size), summing to the weight that
    fell onto the image.

    A sample is spread as the bilinear rule spreads it: a tent as wide as two cells of its level.
    """
    centre = (torch.arange(size) + 0.5) / size

    def tents(along: Tensor) -> Tensor:
        return (1 - (centre[None] - along[:, None]).abs() / samples.cell[:, None]).clamp(min=0)

    x_Ms, y_Ms = tents(samples.location[:, 0]), tents(samples.location[:, 1])
    # A whole tent has the area of one cell.
    share_M = samples.weight / (samples.cell * size).square()
    return torch.einsum("m,my,mx->yx", share_M, y_Ms, x_Ms)


def weight_in(samples: Samples, box: Box, size: int) -> float:
    """How much of the attention falls into a box."""
    left, top, right, bottom = (round(edge * size) for edge in box)
    return float(heat_map(samples, size)[top:bottom, left:right].sum())


def side_shares(along: Tensor, cells: int, size: int) -> Tensor:
    """How much of what is sampled at a coordinate is read from each of `size` equal parts of an image's side.

    A bilinear sample reads the two cells beside it; what it reads outside the image is zero, and counts
    nowhere. Nothing else is lost, whatever `cells` and `size`.

    Args:
        along: coordinates, 0 to 1 within the image; any shape.
        cells: along the side of the level that is sampled.

    Returns:
        `along`'s shape and one axis more, of `size`; sums to 1 for samples half a cell inside.
    """
    place = torch.arange(cells, device=along.device)
    of_cell = (1 - (along[..., None] * cells - 0.5 - place).abs()).clamp(min=0)
    # Each cell's share of each part: how long they overlap.
    part = torch.arange(size, device=along.device)[:, None]
    high = torch.minimum((part + 1) / size, (place + 1) / cells)
    overlap = (high - torch.maximum(part / size, place / cells)).clamp(min=0) * cells
    return of_cell @ overlap.T.to(of_cell.dtype)
