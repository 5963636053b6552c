"""What a model looks at: where its synchronizers sampled earlier images for each token and image region.

    document -> one pass over it                      -> TextAttention: the samples of every text token
             -> each generated image denoised again   -> ImageAttention: heat maps of every region of it

Letters: T text tokens, Y places that look (layers of the language model, maps of the U-Net), H heads, N
images, L levels of a pyramid, P points, R regions of an image (row by row), G cells along a side of a heat
map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.layout import IMAGE
from mm_interleaved.errors import NumericalError, UsageError
from mm_interleaved.generation import diffusion
from mm_interleaved.generation.continuation import Continuation, part_seed
from mm_interleaved.generation.image_batch import GeneratedImages, ImageBatch, ImageRequest
from mm_interleaved.generation.session import encode_each, max_images
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.attention_maps import (
    SynchronizerCall,
    cells_in,
    record_calls,
    side_shares,
    watch_calls,
)
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.batch import check_fits
from mm_interleaved.tokens.processor import MMInterleavedProcessor

Begin = Callable[[Document, GenerationSettings], Continuation]


@dataclass(frozen=True, slots=True, eq=False)
class TextAttention:
    """Where the language model sampled the document's images while it read up to each text token.

    A token is the model's answer to what stands before it, so its samples are those of the token before.
    """

    tokens: tuple[str, ...]
    """T: each token as text; those of a part, joined, are its text."""
    parts: tuple[int, ...]
    """T: the part that each token belongs to."""
    places: tuple[str, ...]
    """Y: such as `layer 2`."""
    images: tuple[int, ...]
    """N: which parts the images are, from old to new."""
    level_sizes: tuple[int, ...]
    """L: cells along a side of each level."""
    location_TYHNP2: Tensor  # noqa: N815
    """float32: (x, y) from the upper left corner of each image, 0 to 1 within it; the same on all levels."""
    weight_TYHNLP: Tensor  # noqa: N815
    """float32, 0 to 1: how much each sample weighs; 0 for images that the token does not see."""
    ignore_TYH: Tensor  # noqa: N815
    """float32: the weight of looking nowhere. With all of `weight` it sums to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttention:
    """Where the U-Net sampled earlier images for each region of one generated image: means of all denoising
    steps.
    """

    part: int
    """Which part the image is."""
    places: tuple[str, ...]
    """Y: such as `skip 3` and `middle`."""
    images: tuple[int, ...]
    """N: which parts the earlier images are, from old to new."""
    level_sizes: tuple[int, ...]
    """L: cells along a side of each level."""
    regions: int
    """Along a side of the image: R is its square. A map of fewer cells says the same of several regions."""
    heat_RYHNLGG: Tensor  # noqa: N815
    """float32: the weight that fell on each cell (row, column) of a grid over each earlier image."""
    ignore_RYH: Tensor  # noqa: N815
    """float32: the weight of looking nowhere."""
    outside_RYH: Tensor  # noqa: N815
    """float32: the weight of what was sampled outside the images, which is zero there. All three sum to 1."""
    pixel_error: float | None
    """Mean difference, in levels of 0 to 255, of the image denoised again from the document's. 0: the maps
    are those of its making. None: they have not the same size."""


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What a model looked at in a document."""

    document: Document
    text: TextAttention | None
    """None: no text layer looks at images, or there are none."""
    images: tuple[ImageAttention, ...]
    """Of each generated image that had earlier ones to look at, in order."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors by name, axes in the name's letters: `text.weight_TYHNLP`, `part3.heat_RYHNLGG`."""
        found: dict[str, Tensor] = {}
        if self.text is not None:
            names = ("location_TYHNP2", "weight_TYHNLP", "ignore_TYH")
            found |= {f"text.{name}": getattr(self.text, name) for name in names}
        for one in self.images:
            found[f"part{one.part}.heat_RYHNLGG"] = one.heat_RYHNLGG
            found[f"part{one.part}.ignore_RYH"] = one.ignore_RYH
            found[f"part{one.part}.outside_RYH"] = one.outside_RYH
        return {name: tensor.numpy() for name, tensor in found.items()}


def explain(
    model: MMInterleavedForConditionalGeneration,
    processor: MMInterleavedProcessor,
    begin: Begin,
    document: Document,
    settings: GenerationSettings,
    *,
    regions: int = 8,
    grid: int = 16,
    on_part: Callable[[int], None] | None = None,
) -> Explanation:
    """What the model looks at in a document that is complete.

    Args:
        begin: opens a document, ready to be continued.
        settings: complete; those that the images were generated with.
        regions: along a side of a generated image.
        grid: cells along a side of its heat maps.
        on_part: called with the index of each image before it is denoised again.

    Raises:
        UsageError: the model has no synchronizers.
        InputError: the document cannot be read, or does not fit.
    """
    decoder = model.image_decoder
    draws = decoder is not None and decoder.synchronizers is not None
    if not draws and not model.language_model.synchronized_layers:
        raise UsageError("this model has no synchronizers: it looks at no image")
    images: list[ImageAttention] = []
    for place, part in enumerate(document.parts if draws else ()):
        if isinstance(part, Image) and part.generated and document.branched(place).images:
            if on_part is not None:
                on_part(place)
            found = _image_attention(begin, document, place, settings, regions, grid)
            images += [] if found is None else [found]
    return Explanation(document, _text_attention(model, processor, document), tuple(images))


# ---- Text ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _text_attention(
    model: MMInterleavedForConditionalGeneration, processor: MMInterleavedProcessor, document: Document
) -> TextAttention | None:
    sequence = processor.encode(document)
    check_fits(sequence, model.config.text_config.max_position_embeddings, max_images(model))
    batch = processor.collate([sequence]).to(device=model.device)
    with record_calls(model) as calls:
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            image_start=batch.image_start,
            logits_to_keep=1,
        )
    tokens = _text_tokens(processor, document)
    if not calls or not tokens:
        return None
    before = [position - 1 for position, _, _ in tokens]
    num_levels = len(calls[0].level_sizes)
    location = _stacked(calls, lambda call: call.plan.location[0, before].unflatten(2, (-1, num_levels)))
    weight = _stacked(calls, lambda call: call.plan.weight[0, before].unflatten(2, (-1, num_levels)))
    return TextAttention(
        tokens=tuple(text for _, _, text in tokens),
        parts=tuple(part for _, part, _ in tokens),
        places=tuple(call.place for call in calls),
        images=_image_parts(document),
        level_sizes=calls[0].level_sizes,
        # Offsets are shared by all levels.
        location_TYHNP2=location[:, :, :, :, 0].contiguous(),
        weight_TYHNLP=weight,
        ignore_TYH=_stacked(calls, lambda call: call.plan.ignore[0, before]),
    )


def _stacked(calls: list[SynchronizerCall], of: Callable[[SynchronizerCall], Tensor]) -> Tensor:
    return torch.stack([of(call).float() for call in calls], dim=1)


def _image_parts(document: Document) -> tuple[int, ...]:
    return tuple(place for place, part in enumerate(document.parts) if isinstance(part, Image))


def _text_tokens(processor: MMInterleavedProcessor, document: Document) -> list[tuple[int, int, str]]:
    """(position, part, text) of each token of each text part, special ones left out."""
    vocabulary, ids = processor.vocabulary, processor.encode(document).input_ids.tolist()
    special = vocabulary.reserved_ids
    ends = [
        _common(ids, processor.encode(document.branched(place)).input_ids.tolist())
        for place in range(len(document.parts) + 1)
    ]
    found: list[tuple[int, int, str]] = []
    for place, part in enumerate(document.parts):
        if isinstance(part, Text):
            # In a conversation also the markers of its turn.
            positions = [each for each in range(ends[place], ends[place + 1]) if ids[each] not in special]
            written = ""
            for count, position in enumerate(positions, start=1):
                read = [ids[each] for each in positions[:count]]
                is_last = count == len(positions)
                text = vocabulary.decode(read) if is_last else vocabulary.decode_settled(read)
                found.append((position, place, text[len(written) :]))
                written = text
    return found


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def text_heat(text: TextAttention, tokens: list[int], grid: int = 16) -> Tensor:
    """The mean of some tokens and of all heads as heat maps over each image, (Y, N, G, G)."""
    location, weight = text.location_TYHNP2[tokens], text.weight_TYHNLP[tokens]
    heat = torch.zeros(len(text.places), len(text.images), grid, grid)
    for level, cells in enumerate(text.level_sizes):
        across, down = (side_shares(location[..., axis], cells, grid) for axis in (0, 1))
        heat += torch.einsum("tahnp,tahnpy,tahnpx->anyx", weight[:, :, :, :, level], down, across)
    return heat / max(1, len(tokens) * weight.shape[2])


# ---- Images --------------------------------------------------------------------------------------------


@torch.no_grad()
def _image_attention(
    begin: Begin,
    document: Document,
    place: int,
    settings: GenerationSettings,
    regions: int,
    grid: int,
) -> ImageAttention | None:
    """One image denoised again from its own noise; None where nothing earlier is looked at."""
    part = document.parts[place]
    assert isinstance(part, Image)
    seed = part_seed(settings.seed, place) if part.seed is None else part.seed
    only_image = GenerationSettings.combine(settings.to_dict(), {"layout": IMAGE})
    continuation = begin(document.branched(place), only_image)
    given = continuation.given_pixels()
    continuation.session = continuation.open_session(encode_each(continuation.model, given))
    request, chosen = continuation.next_image([seed])
    heat = _HeatMaps(regions, grid)
    with watch_calls(continuation.model, heat.add):
        images = _denoised(request)
    if not heat.calls:
        return None
    again, expected = images[0], part.load()
    parts = _image_parts(document)
    return ImageAttention(
        part=place,
        places=tuple(heat.calls),
        images=tuple(parts[number] for number in chosen),
        level_sizes=heat.level_sizes,
        regions=regions,
        heat_RYHNLGG=heat.mean(heat.heat),
        ignore_RYH=heat.mean(heat.ignore),
        outside_RYH=heat.mean(heat.outside),
        pixel_error=diffusion.pixel_error(again, expected) if again.size == expected.size else None,
    )


def _denoised(request: ImageRequest) -> GeneratedImages:
    batch, images = ImageBatch(), None
    batch.add(0, request)
    while len(batch):
        for _, answer in batch.step():
            if isinstance(answer, NumericalError):
                raise answer
            images = answer if isinstance(answer, list) else images
    assert images is not None, "a request ends with its images or an error"
    return images


class _HeatMaps:
    """The sum of heat maps of all calls, map by map: calls themselves would be too many to keep."""

    def __init__(self, regions: int, grid: int):
        self.regions, self.grid = regions, grid
        self.calls: dict[str, int] = {}
        self.heat: dict[str, Tensor] = {}
        self.ignore: dict[str, Tensor] = {}
        self.outside: dict[str, Tensor] = {}
        self.level_sizes: tuple[int, ...] = ()
        self._cells: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, call: SynchronizerCall) -> None:
        """One more denoising step of one map. Of several images at once (guidance) the last counts."""
        if call.map_size is None:
            return
        self.level_sizes = call.level_sizes
        cells_Rk, share_Rk = self._cells_of_regions(call.map_size)
        location_RkHnP2 = call.plan.location[-1, cells_Rk].float()
        weight_RkHnP = call.plan.weight[-1, cells_Rk].float() * share_Rk[:, :, None, None, None]
        levels, num_levels = [], len(call.level_sizes)
        for level, cells in enumerate(call.level_sizes):
            across, down = (
                side_shares(location_RkHnP2[:, :, :, level::num_levels, :, axis], cells, self.grid)
                for axis in (0, 1)
            )
            weight = weight_RkHnP[:, :, :, level::num_levels]
            levels.append(torch.einsum("rkhnp,rkhnpy,rkhnpx->rhnyx", weight, down, across))
        ignore = (call.plan.ignore[-1, cells_Rk].float() * share_Rk[:, :, None]).sum(1)
        heat_RHNLGG = torch.stack(levels, dim=3)
        outside = weight_RkHnP.sum((1, 3, 4)) - heat_RHNLGG.sum((2, 3, 4, 5))
        self.calls[call.place] = self.calls.get(call.place, 0) + 1
        pairs = ((self.heat, heat_RHNLGG), (self.ignore, ignore), (self.outside, outside))
        for sums, new in pairs:
            sums[call.place] = sums[call.place] + new if call.place in sums else new

    def mean(self, sums: dict[str, Tensor]) -> Tensor:
        """Of all calls of each map, the maps along the second axis."""
        return torch.stack([sums[place] / count for place, count in self.calls.items()], dim=1)

    def _cells_of_regions(self, map_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The cells of each region, (R, k), and each one's share of it; short rows are filled with shares of
        nothing.
        """
        if map_size not in self._cells:
            edge = [number / self.regions for number in range(self.regions + 1)]
            found = [
                cells_in((left, top, right, bottom), map_size)
                for top, bottom in pairwise(edge)
                for left, right in pairwise(edge)
            ]
            most = max(map(len, found))
            cells = torch.tensor([row + [row[0]] * (most - len(row)) for row in found])
            share = torch.tensor([[1 / len(row)] * len(row) + [0.0] * (most - len(row)) for row in found])
            self._cells[map_size] = cells, share
        return self._cells[map_size]
