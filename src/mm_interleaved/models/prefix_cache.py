"""All that the model remembers of a prefix, so that a later step or round costs only what is new.

Letters: B rows, R source rows (before beams), T tokens so far, N images so far, D hidden channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from mm_interleaved.errors import UsageError
from mm_interleaved.models.cache_layers import (
    FixedLayer,
    FixedTensor,
    GrowingLayer,
    GrowingTensor,
    keep_address,
)
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.tokens.visibility import NO_IMAGE

LEAST_ROOM_FOR_IMAGES = 4
STATIC_ROOM = 256
"""Static caches best hold a multiple of so many tokens."""


def static_room(num_tokens: int) -> int:
    """Room for so many tokens, rounded up, so that compiled code serves many documents."""
    return -(-num_tokens // STATIC_ROOM) * STATIC_ROOM


class PrefixCache(Cache):
    """transformers' key-value cache, plus final hidden states and projected image values.

    The language model appends hidden states as it appends keys and values; the owner appends images. Images
    belong to source rows; all beams of a row look at the same ones, so they are kept once.

    Args:
        max_cache_len: room for so many tokens from the start, all at addresses that never change, as compiled
            decoding needs it (transformers' `cache_implementation="static"`); None: room as it is needed.

    Raises:
        UsageError: `max_cache_len` with a language model that forgets (sliding windows).

    Attributes:
        room: tokens that it has room for; None: as many as come.
        image_start: (R, N) int64, index of each image's start token in its row, `NO_IMAGE` where there is
            none.
        image_index: (R, N) int64, see `ImageValues.image_BN`.
        image_values: projected features of those images by layer; which stands where is `image_index`.
        source_row: (B,) int64, which row of images each row of the cache looks at; None while each its own.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        max_cache_len: int | None = None,
    ):
        super().__init__(layers=_layers(config, max_cache_len))
        self.room = max_cache_len
        self._hidden = GrowingTensor(1) if max_cache_len is None else FixedTensor(max_cache_len)
        self.image_start = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.image_index = torch.empty_like(self.image_start)
        self.image_values: dict[int, ImageValues] = {}
        self._kept: dict[int, GrowingTensor] = {}
        self.source_row: Tensor | None = None
        self._by_row: tuple[Tensor, dict[int, ImageValues]] | None = None
        self._kept_addresses_of: dict[int, ImageValues] | None = None

    @property
    def is_static(self) -> bool:
        """Whether its room is fixed."""
        return self.room is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of each row, padding included; waits for the device where the cache is static."""
        return int(self.get_seq_length())

    @property
    def num_images(self) -> int:
        """Images of all rows that values are kept of."""
        return next(iter(self._kept.values())).length if self._kept else 0

    @property
    def hidden(self) -> Tensor | None:
        """(B, T, D) final hidden states, or None before the first token."""
        return self._hidden.filled

    def append_hidden(self, hidden_BTD: Tensor) -> None:
        self._hidden.append(hidden_BTD)

    def append_images(self, image_start_RN: Tensor, values: Mapping[int, ImageValues]) -> None:
        """Remember further images, in the order in which they stand: of each source row, or of each row.

        Raises:
            ValueError: a table of another number of rows.
        """
        self._give_rows_their_own(len(image_start_RN))
        self.image_start = torch.cat([self.image_start, image_start_RN], dim=1)
        if values:
            self.image_index = torch.cat([self.image_index, self._index_of(values)], dim=1)
        joined: dict[int, GrowingTensor] = {}
        for layer, new in values.items():
            kept = joined.get(id(new.value))
            if kept is None:
                kept = self._kept.get(layer) or GrowingTensor(0, LEAST_ROOM_FOR_IMAGES)
                kept.append(new.value.flatten(0, -4))
            # Layers may share one tensor, and shall go on sharing it.
            joined[id(new.value)] = self._kept[layer] = kept
            value = kept.whole if self.is_static else kept.filled
            # What was folded of the weights serves the new images as well.
            folded = self.image_values[layer].folded if layer in self.image_values else new.folded
            self.image_values[layer] = new._replace(value=value, folded=folded)
        self._by_row = None

    def _give_rows_their_own(self, num_rows: int) -> None:
        """Where rows of one source are to differ in their images, each gets a table of its own."""
        if num_rows == len(self.image_start):
            return
        if self.source_row is None or num_rows != self.num_rows:
            raise ValueError(f"cache: it has {self.num_rows} rows, found images of {num_rows} rows")
        self.image_start, self.image_index = (
            table[self.source_row] if table.shape[1] else table.new_empty(num_rows, 0)
            for table in (self.image_start, self.image_index)
        )
        self.source_row = None

    def _index_of(self, values: Mapping[int, ImageValues]) -> Tensor:
        """Which of the images kept, these included, stand where: (R, n) for the n new ones of a row."""
        layer, new = next(iter(values.items()))
        num_before = self._kept[layer].length if layer in self._kept else 0
        if new.image_BN is not None:
            return num_before + new.image_BN
        rows, images = new.value.shape[:2]
        return num_before + torch.arange(rows * images, device=self.image_index.device).view(rows, images)

    def images_of_rows(self) -> tuple[Tensor, dict[int, ImageValues]]:
        """Image starts (B, N) and values for each row of the cache; rows of one source share theirs."""
        if self._by_row is None:
            start, index = self.image_start, self.image_index
            if self.is_static and self.image_values:
                # Compiled code sees another shape only where the room for images has grown.
                room = max(LEAST_ROOM_FOR_IMAGES, 1 << (start.shape[1] - 1).bit_length()) - start.shape[1]
                start, index = F.pad(start, (0, room), value=NO_IMAGE), F.pad(index, (0, room))
            if self.source_row is not None:
                start, index = start[self.source_row], index[self.source_row]
            values = {layer: v._replace(image_BN=index) for layer, v in self.image_values.items()}
            self._by_row = start, values
        return self._by_row

    def keep_addresses(self) -> None:
        """Tell the compiler that images, and what is folded for them, stay where they are."""
        start, by_row = self.images_of_rows()
        if self._kept_addresses_of is by_row:
            return
        # Before anything was read with these images, nothing is folded.
        self._kept_addresses_of = by_row if self.num_tokens else None
        keep_address(start)
        for values in by_row.values():
            assert values.image_BN is not None
            folded = [] if values.folded is None else values.folded.tensors()
            keep_address(values.value, values.image_BN, *folded)

    # The four ways in which generation rearranges a cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, and the images that begin with them; a number of 0 or less, as
        transformers counts.
        """
        super().crop(tokens_to_remove)
        self._hidden.crop(-tokens_to_remove)
        if self.image_start.shape[1]:
            self._forget_images(self.image_start >= self.num_tokens)

    def _forget_images(self, is_forgotten_RN: Tensor) -> None:
        """Their values stay where they are, but nobody looks at them any more."""
        if not is_forgotten_RN.any():
            return
        is_left_N = (~is_forgotten_RN & (self.image_start != NO_IMAGE)).any(0)
        self.image_start = self.image_start.masked_fill(is_forgotten_RN, NO_IMAGE)[:, is_left_N]
        if self.image_index.shape[1]:
            self.image_index = self.image_index[:, is_left_N]
        self._by_row = None

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(self.num_rows, device=self.image_start.device)
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    @property
    def num_rows(self) -> int:
        """B, beams counted one by one."""
        return self.image_start.shape[0] if self.source_row is None else len(self.source_row)

    def _select_rows(self, index: Tensor) -> None:
        index = index.to(self.image_start.device, torch.int64)
        rows = index if self.source_row is None else self.source_row[index]
        # Beams change places within their source row, which changes nothing here.
        if self.source_row is None or not torch.equal(rows, self.source_row):
            is_own_row = torch.arange(self.image_start.shape[0], device=rows.device)
            self.source_row = None if torch.equal(rows, is_own_row) else rows
            self._by_row = None
        self._hidden.select_rows(index)


def _layers(config: PreTrainedConfig, max_cache_len: int | None) -> list[Any]:
    """A layer's memory each, of the kind that the language model needs."""
    if max_cache_len is None:
        layers: list[Any] = DynamicCache(config=config).layers
        return [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]
    layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
    if any(type(layer) is not StaticLayer for layer in layers):
        raise UsageError(
            f"a static cache needs full attention in all layers, but those of this {config.model_type} "
            "model attend in windows; use cache_implementation='dynamic'",
            field="cache_implementation",
        )
    return [FixedLayer(max_cache_len) for _ in layers]
