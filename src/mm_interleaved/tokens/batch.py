"""Rows of token sequences with their images, ready for the model.

Letters: B rows, T tokens per row, N images in the row with most of them, I images in all (row-major: all of
row 0, then all of row 1, ...), C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mm_interleaved.documents.document import Image
from mm_interleaved.errors import TooLongError
from mm_interleaved.tokens.sequence import Sequence
from mm_interleaved.tokens.visibility import NO_IMAGE
from mm_interleaved.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Mapping[str, "Tensor | None"]):
    """What the model is given; also a mapping, for `model(**batch)` and `model.generate(**batch)`."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) bool, False at padding."""
    position_ids: Tensor
    """(B, T) int64, 0 at the first token of each document, and at padding."""
    document_start: Tensor
    """(B, T) int64: index of the first token of the token's document. Padding is a document of its own."""
    image_start: Tensor
    """(B, N) int64: index, in the row, of each image's start token; NO_IMAGE (-1) behind the last one."""
    pixel_values: Tensor
    """(I, 3, H, W) float in [0, 1], for the encoder."""
    target_pixel_values: Tensor | None
    """(I, 3, H', W') float in [0, 1], what the decoder has to generate; None where no images are learned."""
    text_target: Tensor
    """(B, T) bool: this token counts in the text loss, as the one to be predicted."""
    image_target: Tensor
    """(I,) bool: this image counts in the image loss."""

    def __getitem__(self, name: str) -> Tensor | None:
        if name not in iter(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    @property
    def num_images(self) -> int:
        """I."""
        return self.pixel_values.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on a device; `dtype` is that of the pixels."""

        def moved(pixels: Tensor | None) -> Tensor | None:
            return None if pixels is None else pixels.to(device=device, dtype=dtype)

        indices = ("input_ids", "attention_mask", "position_ids", "document_start", "image_start")
        masks = ("text_target", "image_target")
        return replace(
            self,
            pixel_values=moved(self.pixel_values),
            target_pixel_values=moved(self.target_pixel_values),
            **{name: getattr(self, name).to(device=device) for name in indices + masks},
        )


class PixelRule(Protocol):
    """Makes pixels of one fixed square size out of an image (`images.SquareCrop` is one)."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        ...

    def __call__(self, image: PILImage.Image) -> np.ndarray:
        """(3, size, size) float32 in [0, 1] of an RGB image."""
        ...


def check_fits(sequence: Sequence, max_length: int, max_images: int | None = None):
    """Raises TooLongError where a sequence alone exceeds a row."""
    if len(sequence) > max_length:
        raise TooLongError(f"the document has {len(sequence)} tokens, expected at most {max_length}")
    if max_images is not None and len(sequence.images) > max_images:
        raise TooLongError(f"the document has {len(sequence.images)} images, expected at most {max_images}")


def collate(
    rows: Iterable[Sequence | list[Sequence]],
    vocabulary: Vocabulary,
    encoder_pixels: PixelRule,
    target_pixels: PixelRule | None = None,
    *,
    padding_side: str = "right",
) -> Batch:
    """One batch of rows; a row is a sequence, or several packed one after the other.

    Args:
        encoder_pixels: what the encoder sees of an image.
        target_pixels: what the decoder has to generate of it; None where images are not learned.
        padding_side: "right", or "left" for generating text in a batch.

    Raises:
        ImageError: an image cannot be read.
        ValueError: no rows, or a slot table that does not agree with the ids.
    """
    packed = [[row] if isinstance(row, Sequence) else list(row) for row in rows]
    if not packed or not all(packed):
        raise ValueError("expected at least one sequence in each row, found none")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', found {padding_side!r}")
    num_tokens = max(sum(len(sequence) for sequence in row) for row in packed)
    num_images = max(sum(len(sequence.images) for sequence in row) for row in packed)
    table = _Table(len(packed), num_tokens, num_images, vocabulary.pad)
    for index, row in enumerate(packed):
        length = sum(len(sequence) for sequence in row)
        table.fill(index, row, first=0 if padding_side == "right" else num_tokens - length)
    sequences = [sequence for row in packed for sequence in row]
    pixel_values, target_pixel_values = _pixels(sequences, encoder_pixels, target_pixels)
    image_target = np.concatenate([sequence.image_is_target for sequence in sequences])
    batch = Batch(
        input_ids=torch.from_numpy(table.input_ids),
        attention_mask=torch.from_numpy(table.attention_mask),
        position_ids=torch.from_numpy(table.position_ids),
        document_start=torch.from_numpy(table.document_start),
        image_start=torch.from_numpy(table.image_start),
        pixel_values=pixel_values,
        target_pixel_values=target_pixel_values,
        text_target=torch.from_numpy(table.text_target),
        image_target=torch.from_numpy(image_target),
    )
    check_slots(batch.input_ids, batch.image_start, vocabulary)
    return batch


def stack_batches(batches: SequenceABC[Batch], pad: int, length: int | None = None) -> Batch:
    """The rows of all batches in one, padded on the right with the id `pad`.

    Args:
        length: tokens a row has at least; default as many as the longest has.
    """
    num_tokens = max(length or 0, *(batch.input_ids.shape[1] for batch in batches))
    num_images = max(batch.image_start.shape[1] for batch in batches)

    def tokens(name: str, value: int) -> Tensor:
        return torch.cat([_widened(getattr(batch, name), num_tokens, value) for batch in batches])

    starts = []
    for batch in batches:
        # Padding is one document; where a row has none yet, it begins here.
        is_full, last = batch.attention_mask[:, -1], batch.document_start[:, -1]
        begin = torch.where(is_full, batch.input_ids.shape[1], last)
        added = num_tokens - batch.input_ids.shape[1]
        starts.append(torch.cat([batch.document_start, begin[:, None].expand(-1, added)], dim=1))
    targets = [batch.target_pixel_values for batch in batches if batch.target_pixel_values is not None]
    if targets and len(targets) < len(batches):
        raise ValueError("expected target pixels in all batches or in none, found them in some")
    return Batch(
        input_ids=tokens("input_ids", pad),
        attention_mask=tokens("attention_mask", False),
        position_ids=tokens("position_ids", 0),
        document_start=torch.cat(starts),
        image_start=torch.cat([_widened(batch.image_start, num_images, NO_IMAGE) for batch in batches]),
        pixel_values=torch.cat([batch.pixel_values for batch in batches]),
        target_pixel_values=torch.cat(targets) if targets else None,
        text_target=tokens("text_target", False),
        image_target=torch.cat([batch.image_target for batch in batches]),
    )


def blank_batch(
    vocabulary: Vocabulary, encoder_pixels: PixelRule, target_pixels: PixelRule | None = None
) -> Batch:
    """One row, a grey image, of which nothing counts in a loss.

    Stacked under a batch without images, it lets all parameters take part, with gradients of zero, so that
    ranks with and without images do not wait for each other.
    """
    ids = [vocabulary.bos, *vocabulary.image_ids()]
    grey = Image(PILImage.new("RGB", (8, 8), (128, 128, 128)))
    nothing = Sequence(
        input_ids=np.array(ids, dtype=np.int64),
        image_starts=np.array([1], dtype=np.int64),
        images=(grey,),
        text_is_target=np.zeros(len(ids), dtype=bool),
        image_is_target=np.zeros(1, dtype=bool),
        part_starts=np.array([1], dtype=np.int64),
    )
    return collate([nothing], vocabulary, encoder_pixels, target_pixels)


def _widened(table_BX: Tensor, width: int, value: int) -> Tensor:
    """More columns on the right, filled with a value."""
    return torch.nn.functional.pad(table_BX, (0, width - table_BX.shape[1]), value=value)


def check_slots(input_ids_BT: Tensor, image_start_BN: Tensor, vocabulary: Vocabulary):
    """Makes sure that image starts and slots stand exactly where the slot table has them, and nowhere else.

    A count would not do: one slot id out of user text and one slot lost would balance, and every later image
    would be bound to the wrong place. Raises ValueError with the first position that disagrees.
    """
    expected_BT = torch.zeros_like(input_ids_BT)
    for row, starts_N in zip(expected_BT, image_start_BN, strict=True):
        for start in starts_N.tolist():
            if start == NO_IMAGE:
                continue
            if start < 0 or start + vocabulary.num_slots >= len(row):
                raise ValueError(
                    f"an image starts at token {start}, expected its slots inside {len(row)} tokens"
                )
            row[start] = vocabulary.image_start
            row[start + 1 : start + 1 + vocabulary.num_slots] = vocabulary.image
    is_special_BT = (input_ids_BT == vocabulary.image_start) | (input_ids_BT == vocabulary.image)
    found_BT = torch.where(is_special_BT, input_ids_BT, 0)
    wrong = (found_BT != expected_BT).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"row {row}, token {column}: found id {int(input_ids_BT[row, column])}, expected "
            f"{int(expected_BT[row, column]) or 'ordinary text'} by the slot table"
        )


class _Table:
    """The index arrays of a batch while they are filled, row by row."""

    def __init__(self, num_rows: int, num_tokens: int, num_images: int, pad: int):
        shape = (num_rows, num_tokens)
        self.input_ids = np.full(shape, pad, dtype=np.int64)
        self.attention_mask = np.zeros(shape, dtype=bool)
        self.position_ids = np.zeros(shape, dtype=np.int64)
        self.document_start = np.zeros(shape, dtype=np.int64)
        self.text_target = np.zeros(shape, dtype=bool)
        self.image_start = np.full((num_rows, num_images), NO_IMAGE, dtype=np.int64)

    def fill(self, row: int, sequences: list[Sequence], first: int):
        """Puts the sequences into a row, one after the other, from token `first` on."""
        start, image = first, 0
        for sequence in sequences:
            end, next_image = start + len(sequence), image + len(sequence.images)
            self.input_ids[row, start:end] = sequence.input_ids
            self.attention_mask[row, start:end] = True
            self.position_ids[row, start:end] = np.arange(len(sequence))
            self.document_start[row, start:end] = start
            self.text_target[row, start:end] = sequence.text_is_target
            self.image_start[row, image:next_image] = sequence.image_starts + start
            start, image = end, next_image
        # Right padding becomes a document of its own (left padding already is one): it sees no images.
        self.document_start[row, start:] = start


def _pixels(
    sequences: list[Sequence], encoder_pixels: PixelRule, target_pixels: PixelRule | None
) -> tuple[Tensor, Tensor | None]:
    encoder, target = [], []
    for sequence in sequences:
        for image in sequence.images:
            opened = image.load()
            encoder.append(encoder_pixels(opened))
            if target_pixels is not None:
                target.append(target_pixels(opened))
    return _stacked(encoder, encoder_pixels), None if target_pixels is None else _stacked(
        target, target_pixels
    )


def _stacked(arrays: list[np.ndarray], rule: PixelRule) -> Tensor:
    if not arrays:
        return torch.zeros(0, 3, rule.size, rule.size)
    return torch.from_numpy(np.stack(arrays))
