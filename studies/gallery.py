"""A sheet of pictures that the model paints for the first prompts of a test set, none left out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import to_png
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.storyworld.renderer import sheet_of
from mm_interleaved.storyworld.scores import answer_parts, first_image, score
from mm_interleaved.storyworld.tasks import document, part_pixels

_SCALE = 2


def show_gallery(
    generator: InterleavedGenerator,
    seed: int,
    count: int,
    columns: int,
    path: Path,
    on_painted: Callable[[Document], None],
) -> dict[str, float]:
    """Paints `draw` documents 0 to `count` - 1 of the test split, row by row; returns their scores.

    Args:
        path: the PNG to be written, its folder too if need be.
        on_painted: called with each document when it is done.

    Raises:
        UsageError: the model paints no pictures.
    """
    gold, painted, pixels = [], [], []
    for index in range(count):
        gold.append(document("test", seed, index, "draw"))
        painted.append(generator.generate(gold[-1], seed=index))
        image = first_image(answer_parts(painted[-1]))
        assert image is not None, "a layout of one picture gives one"
        pixels.append(part_pixels(image))
        on_painted(painted[-1])
    make_folder(path.parent)
    write_file(path, to_png(PILImage.fromarray(sheet_of(np.stack(pixels), columns, _SCALE))))
    return score(painted, gold)
