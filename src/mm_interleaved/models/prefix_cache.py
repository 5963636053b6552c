"""All that the model remembers of a prefix, so that a later step or round costs only what is new.

Letters: B rows, R source rows (before beams), T tokens so far, N images so far, D hidden channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from mm_interleaved.models.synchronizer import ImageValues


class PrefixCache(DynamicCache):
    """transformers' key-value cache, plus final hidden states and projected image values.

    The language model appends hidden states as it appends keys and values; the owner appends images. Images
    belong to source rows; all beams of a row look at the same ones, so they are kept once.

    Attributes:
        hidden: (B, T, D) final hidden states, or None before the first token.
        image_start: (R, N) int64, index of each image's start token in its row, `NO_IMAGE` where there is
            none.
        image_values: projected features of those images by layer; which stands where is `image_index`.
        image_index: (R, N) int64, see `ImageValues.image_BN`.
        source_row: (B,) int64, which row of images each row of the cache looks at; None while each its own.
    """

    def __init__(self, config: PreTrainedConfig, *, batch_size: int = 1, device: torch.device | str = "cpu"):
        super().__init__(config=config)
        self.hidden: Tensor | None = None
        self.image_start = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.image_values: dict[int, ImageValues] = {}
        self.image_index = torch.empty_like(self.image_start)
        self.source_row: Tensor | None = None
        self._by_row: tuple[Tensor, dict[int, ImageValues]] | None = None

    def append_hidden(self, hidden_BTD: Tensor) -> None:
        self.hidden = hidden_BTD if self.hidden is None else torch.cat([self.hidden, hidden_BTD], dim=1)

    def append_images(self, image_start_RN: Tensor, values: Mapping[int, ImageValues]) -> None:
        """Remember further images of each source row, in the order in which they stand."""
        self.image_start = torch.cat([self.image_start, image_start_RN], dim=1)
        if values:
            self.image_index = torch.cat([self.image_index, self._index_of(values)], dim=1)
        joined: dict[int, Tensor] = {}
        for layer, new in values.items():
            old = self.image_values.get(layer)
            if id(new.value) not in joined:
                # Layers may share one tensor, and shall go on sharing it.
                new_JSHd = new.value.flatten(0, -4)
                joined[id(new.value)] = new_JSHd if old is None else torch.cat([old.value, new_JSHd])
            # What was folded of the weights serves the new images as well.
            folded = new.folded if old is None else old.folded
            self.image_values[layer] = new._replace(value=joined[id(new.value)], folded=folded)
        self._by_row = None

    def _index_of(self, values: Mapping[int, ImageValues]) -> Tensor:
        """Which of the images kept, these included, stand where: (R, n) for the n new ones of a row."""
        layer, new = next(iter(values.items()))
        num_before = len(self.image_values[layer].value) if layer in self.image_values else 0
        if new.image_BN is not None:
            return num_before + new.image_BN
        rows, images = new.value.shape[:2]
        return num_before + torch.arange(rows * images, device=self.image_index.device).view(rows, images)

    def images_of_rows(self) -> tuple[Tensor, dict[int, ImageValues]]:
        """Image starts (B, N) and values for each row of the cache; rows of one source share theirs."""
        if self._by_row is None:
            start, index = self.image_start, self.image_index
            if self.source_row is not None:
                start, index = start[self.source_row], index[self.source_row]
            values = {layer: v._replace(image_BN=index) for layer, v in self.image_values.items()}
            self._by_row = start, values
        return self._by_row

    # The four ways in which generation rearranges a cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; a number of 0 or less, as transformers counts."""
        super().crop(tokens_to_remove)
        if self.hidden is not None and tokens_to_remove:
            self.hidden = self.hidden[:, : -abs(tokens_to_remove)]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(self._num_rows, device=self.image_start.device)
        self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    @property
    def _num_rows(self) -> int:
        return self.image_start.shape[0] if self.source_row is None else len(self.source_row)

    def _select_rows(self, index: Tensor) -> None:
        index = index.to(self.image_start.device, torch.int64)
        rows = index if self.source_row is None else self.source_row[index]
        # Beams change places within their source row, which changes nothing here.
        if self.source_row is None or not torch.equal(rows, self.source_row):
            is_own_row = torch.arange(self.image_start.shape[0], device=rows.device)
            self.source_row = None if torch.equal(rows, is_own_row) else rows
            self._by_row = None
        if self.hidden is not None:
            self.hidden = self.hidden[index.to(self.hidden.device)]
