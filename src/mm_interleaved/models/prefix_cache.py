"""All that the model remembers of a prefix, so that a later step or round costs only what is new.

Letters: B rows, T tokens so far, N images so far, D hidden channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from mm_interleaved.models.synchronizer import ImageValues
from mm_interleaved.visibility import NO_IMAGE


class PrefixCache(DynamicCache):
    """transformers' key-value cache, plus final hidden states and projected image values.

    The language model appends hidden states as it appends keys and values; the owner appends images. Rows of image
    values are shared by all beams of a row: `image_row` says which row of images each row of the cache looks at.

    Attributes:
        hidden: (B, T, D) final hidden states, or None before the first token.
        image_start: (R, N) int64, index of each image's start token in its row, `NO_IMAGE` where there is none.
        image_values: projected features of those images by layer, each (R, N, S, H, d).
        image_row: (B,) int64.
    """

    def __init__(self, config: PreTrainedConfig, *, batch_size: int = 1, device: torch.device | str = "cpu"):
        super().__init__(config=config)
        self.hidden: Tensor | None = None
        self.image_start = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.image_values: dict[int, ImageValues] = {}
        self.image_row = torch.arange(batch_size, device=device)

    def append_hidden(self, hidden_BTD: Tensor) -> None:
        self.hidden = hidden_BTD if self.hidden is None else torch.cat([self.hidden, hidden_BTD], dim=1)

    def append_images(self, image_start_RN: Tensor, values: Mapping[int, ImageValues]) -> None:
        """Remember further images of each row, in the order in which they stand."""
        self.image_start = torch.cat([self.image_start, image_start_RN], dim=1)
        for layer, new in values.items():
            old = self.image_values.get(layer)
            self.image_values[layer] = new if old is None else new._replace(value=torch.cat([old.value, new.value], 1))

    def images_of_rows(self) -> tuple[Tensor, dict[int, ImageValues]]:
        """Image starts (B, N) and values (B, N, ...) for each row of the cache."""
        start, values = self.image_start, self.image_values
        if len(self.image_row) != start.shape[0]:
            start = start[self.image_row]
            values = {layer: v._replace(value=v.value[self.image_row]) for layer, v in values.items()}
        return start, values

    @property
    def has_images(self) -> bool:
        return bool(self.image_start.shape[1]) and bool((self.image_start != NO_IMAGE).any())

    # The four ways in which generation rearranges a cache.

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        if self.hidden is not None:
            self.hidden = self.hidden[:, :max_length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(len(self.image_row), device=self.image_row.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def _select_rows(self, index: Tensor) -> None:
        self.image_row = self.image_row[index.to(self.image_row.device)]
        if self.hidden is not None:
            self.hidden = self.hidden[index.to(self.hidden.device)]
