"""What the oracle reads in the images of documents, each of them read once.

Scores, tables and pages ask for the same images; reading one takes fifteen milliseconds.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mm_interleaved.documents.document import Image
from mm_interleaved.storyworld.backgrounds import IMAGE_SIZE
from mm_interleaved.storyworld.oracle import Reading, read_scene
from mm_interleaved.storyworld.tasks import part_pixels

_MAX_KEPT = 2048
"""Images whose readings are kept: 12 kB each."""


def read_image(image: Image) -> Reading:
    """See `oracle.read_scene`. Raises ImageError where the image cannot be opened."""
    return _read(part_pixels(image).tobytes())


@lru_cache(maxsize=_MAX_KEPT)
def _read(pixels: bytes) -> Reading:
    return read_scene(np.frombuffer(pixels, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3))
