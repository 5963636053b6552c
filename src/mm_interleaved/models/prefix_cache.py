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
        image_values: projected features of those images by layer, each (R, N, S, H, d).
        source_row: (B,) int64, which row of images each row of the cache looks at; None while each its own.
    """

    def __init__(self, config: PreTrainedConfig, *, batch_size: int = 1, device: torch.device | str = "cpu"):
        super().__init__(config=config)
        self.hidden: Tensor | None = None
        self.image_start = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.image_values: dict[int, ImageValues] = {}
        self.source_row: Tensor | None = None
        self._gathered: tuple[Tensor, dict[int, ImageValues]] | None = None

    def append_hidden(self, hidden_BTD: Tensor) -> None:
        self.hidden = hidden_BTD if self.hidden is None else torch.cat([self.hidden, hidden_BTD], dim=1)

    def append_images(self, image_start_RN: Tensor, values: Mapping[int, ImageValues]) -> None:
        """Remember further images of each source row, in the order in which they stand."""
        self.image_start = torch.cat([self.image_start, image_start_RN], dim=1)
        for layer, new in values.items():
            old = self.image_values.get(layer)
            value = new.value if old is None else torch.cat([old.value, new.value], dim=1)
            self.image_values[layer] = new._replace(value=value)
        self._gathered = None

    def images_of_rows(self) -> tuple[Tensor, dict[int, ImageValues]]:
        """Image starts (B, N) and values (B, N, ...) for each row of the cache."""
        if self.source_row is None:
            return self.image_start, self.image_values
        if self._gathered is None:
            row = self.source_row
            values = {layer: v._replace(value=v.value[row]) for layer, v in self.image_values.items()}
            self._gathered = self.image_start[row], values
        return self._gathered

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
        # Beams change places within their source row, which changes nothing here: keep what was gathered.
        if self.source_row is None or not torch.equal(rows, self.source_row):
            is_own_row = torch.arange(self.image_start.shape[0], device=rows.device)
            self.source_row = None if torch.equal(rows, is_own_row) else rows
            self._gathered = None
        if self.hidden is not None:
            self.hidden = self.hidden[index.to(self.hidden.device)]
