"""A sheet of the images that a model generates for the first prompts of a test set, none left out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, answer_parts
from mm_interleaved.documents.images import to_png
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.storyworld.renderer import sheet_of
from mm_interleaved.storyworld.scores import first_image, score
from mm_interleaved.storyworld.tasks import document, part_pixels

_SCALE = 2


def write_gallery(
    generator: InterleavedGenerator,
    seed: int,
    count: int,
    columns: int,
    path: Path,
    on_generated: Callable[[Document], None],
) -> dict[str, float]:
    """Generates `draw` documents 0 to `count` - 1 of the test split, row by row; returns their scores.

    Args:
        path: the PNG to be written, its folder too if need be.
        on_generated: called with each document when it is done.

    Raises:
        UsageError: the model generates no images.
    """
    gold, generated, pixels = [], [], []
    for index in range(count):
        gold.append(document("test", seed, index, "draw"))
        generated.append(generator.generate(gold[-1], seed=index))
        image = first_image(answer_parts(generated[-1]))
        assert image is not None, "a layout of one image gives one"
        pixels.append(part_pixels(image))
        on_generated(generated[-1])
    make_folder(path.parent)
    write_file(path, to_png(PILImage.fromarray(sheet_of(np.stack(pixels), columns, _SCALE))))
    return score(generated, gold)
