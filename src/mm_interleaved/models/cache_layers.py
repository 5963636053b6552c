"""Memory that grows in place: of a tensor, and of one layer's keys and values.

    GrowingTensor, GrowingLayer: take room as they need it, and half as much again, so that they rarely move
    FixedTensor, FixedLayer:     have all their room from the start and never move, for compiled decoding

`torch.cat` at every token moves all tokens before it: n tokens cost n² / 2 moves, here less than 3 n.
Letters: B rows, T tokens so far, D channels.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

LEAST_ROOM = 32
"""Entries that a growing tensor has room for at least."""
GROWTH = 1.5
"""Room after a move, as a multiple of what is needed: at most so much memory is taken."""


class GrowingTensor:
    """A tensor that grows along one axis, in place where it may.

    Where gradients flow, it is made anew at every step, as autograd needs it.
    """

    def __init__(self, axis: int, least_room: int = LEAST_ROOM):
        self.axis, self.least_room = axis, least_room
        self.length = 0
        self._room: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """All that was appended, a view; None before the first time."""
        return None if self._room is None else self._room.narrow(self.axis, 0, self.length)

    @property
    def whole(self) -> Tensor | None:
        """The same with the room behind it, whose content means nothing. Its shape changes rarely."""
        return self._room

    def append(self, new: Tensor) -> Tensor:
        """All that stands there, the new included: a view, good until the next change."""
        old, end = self.filled, self.length + new.shape[self.axis]
        if old is None:
            old = new.narrow(self.axis, 0, 0)
        if (new.requires_grad and torch.is_grad_enabled()) or old.requires_grad:
            self._room = torch.cat([old, new], dim=self.axis)
        else:
            if not self._has_room(end):
                self._move(old.detach(), end)
            assert self._room is not None
            self._room.narrow(self.axis, self.length, end - self.length).copy_(new)
        self.length = end
        return self._room.narrow(self.axis, 0, end)

    def crop(self, count: int) -> None:
        """Forget the newest entries."""
        self.length = max(0, self.length - count)

    def select_rows(self, index: Tensor) -> None:
        """Keep these rows of axis 0, in this order; one may be chosen many times."""
        if self.filled is not None:
            self._room = self.filled.index_select(0, index.to(self.filled.device))

    def _has_room(self, end: int) -> bool:
        if self._room is None or self._room.shape[self.axis] < end:
            return False
        # What was made in inference mode may be written in inference mode only.
        return not self._room.is_inference() or torch.is_inference_mode_enabled()

    def _move(self, old: Tensor, end: int) -> None:
        shape = list(old.shape)
        shape[self.axis] = max(self.least_room, end if self._room is None else int(GROWTH * end))
        # Not empty: `whole` may be multiplied by weights of zero, which makes no zero of what is no number.
        self._room = old.new_zeros(shape)
        self._room.narrow(self.axis, 0, self.length).copy_(old)


class FixedTensor:
    """Hidden states (B, T, D) in room for `max_length` tokens, whose length is a tensor too.

    Compiled code, CUDA graphs among it, writes into it without being compiled again for each length.
    """

    length: Tensor

    def __init__(self, max_length: int):
        self.max_length = max_length
        self._room: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """See `GrowingTensor.filled`; waits for the device."""
        return None if self._room is None else self._room[:, : int(self.length)]

    def append(self, new_BTD: Tensor) -> None:
        if self._room is None:
            self._room = new_BTD.new_zeros(new_BTD.shape[0], self.max_length, new_BTD.shape[2])
            self.length = torch.zeros((), dtype=torch.int64, device=new_BTD.device)
            keep_address(self._room, self.length)
        count = new_BTD.shape[1]
        place_T = torch.arange(count, device=new_BTD.device) + self.length
        self.length.add_(count)
        self._room.index_copy_(1, place_T, new_BTD)

    def crop(self, count: int) -> None:
        """Forget the newest entries."""
        if self._room is not None:
            self.length.sub_(count)

    def select_rows(self, index: Tensor) -> None:
        """See `GrowingTensor.select_rows`."""
        if self._room is not None:
            self._room = _selected(self._room, index)


class GrowingLayer(DynamicLayer):
    """transformers' growing layer, which writes where it stands instead of moving at every token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._growing = GrowingTensor(-2), GrowingTensor(-2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._growing
        self.keys, self.values = keys.append(key_states), values.append(value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            for part in self._growing:
                part.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(indices)

    def _select_rows(self, index: Tensor) -> None:
        if self.get_seq_length():
            for part in self._growing:
                part.select_rows(index)
            self.keys, self.values = (part.filled for part in self._growing)


class FixedLayer(StaticLayer):
    """transformers' static layer, which can also forget and rearrange, as the growing one can."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        # What stands behind the end is masked until it is written again.
        if self.is_initialized:
            self.cumulative_length.sub_(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.keys.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(indices)

    def _select_rows(self, index: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _selected(self.keys, index), _selected(self.values, index)
            self.batch_size = len(index)


def _selected(room: Tensor, index: Tensor) -> Tensor:
    """Rows of axis 0: where their number stays, at the same address."""
    index = index.to(room.device)
    if len(index) == len(room):
        return room.copy_(room.index_select(0, index))
    chosen = room.index_select(0, index)
    keep_address(chosen)
    return chosen


def keep_address(*tensors: Tensor) -> None:
    """Tell the compiler that these stay where they are, as transformers does for its own.

    CUDA graphs write into no others, and copy all others before every pass.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)  # pyright: ignore[reportPrivateUsage]
