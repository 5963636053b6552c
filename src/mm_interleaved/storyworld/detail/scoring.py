"""How right generated images of boards are, and answers about them: numbers from 0 to 1.

A cell is read where the truth's board hangs, and counts if nothing hides it in the truth, nor hid it in all
earlier images: what no image showed, nobody can know.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.storyworld.detail.boards import DetailScene, detail_from_record
from mm_interleaved.storyworld.detail.reading import read_cells, read_detail, to_pixels
from mm_interleaved.storyworld.detail.rendering import visible_cells
from mm_interleaved.storyworld.oracle import attribute_matches

Found = dict[str, list[float]]


def knowable_cells(truth: DetailScene, earlier: Sequence[DetailScene]) -> np.ndarray:
    """(cells,) bool: cells of a board that its image shows, and one of the earlier images showed."""
    return visible_cells(truth) & np.any([visible_cells(scene) for scene in earlier], axis=0)


def shown_before(document: Document, number: int) -> list[DetailScene]:
    """What the images before image `number` of a document show of its board: a map shows nothing of it."""
    scenes = [detail_from_record(record) for record in document.meta["scenes"]]
    return scenes[:1] if document.meta["task"] == "detail_segmentation" else scenes[:number]


def cells_right(pixels: np.ndarray, truth: DetailScene) -> np.ndarray:
    """(cells,) bool: which cells an image, (S, S, 3) uint8, shows as and where the truth has them."""
    board = truth.board
    return read_cells(to_pixels(pixels), board, truth.scene.time) == np.array(board.cells)


def score_detail_images(found: Found, document: Document, answer: Sequence[Part]) -> None:
    """Adds what each image of an answer keeps; an image that is missing keeps nothing."""
    task = document.meta["task"]
    scenes = [detail_from_record(record) for record in document.meta["scenes"]]
    first = len(scenes) - sum(isinstance(part, Image) for part in document.target)
    images = [part for part in answer if isinstance(part, Image)]
    for number in range(first, len(scenes)):
        image = images[number - first] if number - first < len(images) else None
        values = dict.fromkeys(("cells_kept", "attributes", "board_placed"), 0.0)
        if image is not None:
            values = _values(_pixels(image, document.meta), scenes[number], shown_before(document, number))
        for name, value in values.items():
            found.setdefault(f"{task}.{name}", []).append(value)


def _values(pixels: np.ndarray, truth: DetailScene, earlier: Sequence[DetailScene]) -> Mapping[str, float]:
    reading, counts = read_detail(pixels), knowable_cells(truth, earlier)
    is_placed = _hanging(reading.board) == _hanging(truth.board)
    return {
        "cells_kept": float(cells_right(pixels, truth)[counts].mean()) if counts.any() else 1.0,
        "attributes": mean(attribute_matches(reading.reading, truth.scene, badges=True)),
        "board_placed": float(is_placed),
    }


def _hanging(board: Any) -> tuple[str, str, str, str]:
    return board.kind, board.scale, board.position, board.height


def _pixels(image: Image, meta: Mapping[str, Any]) -> np.ndarray:
    """(S, S, 3) uint8 at the document's size, whatever size the image has."""
    loaded = image.load()
    size = (meta["image_size"], meta["image_size"])
    return np.asarray(loaded if loaded.size == size else loaded.resize(size))


def score_detail_answer(found: Found, document: Document, answer: Sequence[Part]) -> None:
    """Adds whether an answer in words is the gold one."""
    said, gold = (
        " ".join(part.text for part in parts if isinstance(part, Text)).strip().rstrip(".").strip().lower()
        for parts in (answer, document.target)
    )
    found.setdefault(f"{document.meta['task']}.fine_detail", []).append(float(said == gold))
