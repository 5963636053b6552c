"""Where boards hang, as class labels: all that a conditioning may say of them, for no slot holds what they
show.

Two attributes beside those of `attribute_supervision`, for the two halves of a conditioning that these leave
free: what hangs how in the image to be generated, and how that hung in the image before it, which is where
the U-Net has to look.
Letters: I images.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.recipes.storyworld.attribute_supervision import NO_LABEL
from mm_interleaved.storyworld.detail.boards import (
    HEIGHTS,
    KINDS,
    SCALES,
    Board,
    check_board,
    hanging_positions,
)

_NONE = "no board"
WAYS = tuple(
    f"{scale} {height} {position}"
    for scale in SCALES
    for position in hanging_positions(scale)
    for height in HEIGHTS
)
BOARD_VALUES = {
    "board": (_NONE, *(f"{kind} {way}" for kind in KINDS for way in WAYS)),
    "board_before": (_NONE, *WAYS),
}
NUM_BOARD_VALUES = [len(values) for values in BOARD_VALUES.values()]


def board_labels(documents: Sequence[Document]) -> Tensor:
    """For each image the indices of its values in BOARD_VALUES, or NO_LABEL: (I, 2) int64.

    The images are those of all documents in order. Of an image without anything before it nothing is known,
    nor of a map, nor of a document without scenes.
    """
    rows = [row for document in documents for row in _labels_of(document)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(BOARD_VALUES))


def _labels_of(document: Document) -> Iterator[list[int]]:
    unknown = [NO_LABEL] * len(BOARD_VALUES)
    before: Board | None = None
    boards = boards_of(document)
    images = [index for index, part in enumerate(document.parts) if isinstance(part, Image)]
    for number, index in enumerate(images):
        if number >= len(boards) or is_map(document, number):
            yield unknown
            continue
        board = boards[number]
        yield unknown if index == 0 else _values(board, before)
        before = board or before


def _values(board: Board | None, before: Board | None) -> list[int]:
    now = _NONE if board is None else f"{board.kind} {_way(board)}"
    then = _NONE if before is None else _way(before)
    return [values.index(value) for values, value in zip(BOARD_VALUES.values(), (now, then), strict=True)]


def _way(board: Board) -> str:
    return f"{board.scale} {board.height} {board.position}"


def is_map(document: Document, number: int) -> bool:
    """Whether image `number` of a document about boards is a map, of which no code says anything."""
    return document.meta.get("task") == "detail_segmentation" and number == 1


def boards_of(document: Document) -> list[Board | None]:
    """The board of each image, None where it has none."""
    records = document.meta.get("scenes", ())
    return [check_board(record["board"]) if "board" in record else None for record in records]
