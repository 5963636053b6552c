"""A generator without a model, for tests of everything around the model: it follows the layout, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, TooLongError
from mm_interleaved.generation.events import Failed, Finished, ImageDone, ImageStarted, TextDelta
from mm_interleaved.generation.settings import GenerationSettings


class EchoGenerator:
    """Writes its seed and draws noise; refuses documents that say "too long"."""

    def warn_of_unknown_words(self, documents):
        """Knows all words."""

    def stream_batch(self, documents: Sequence[Document], settings: Sequence[GenerationSettings]):
        for place, document in enumerate(documents):
            try:
                for event in self.stream(document, settings=settings[place]):
                    yield place, event
            except InputError as error:
                yield place, Failed(error)

    def stream(self, document: Document, *, settings: GenerationSettings):
        for image in document.images:
            image.load()
        if "too long" in document.text:
            raise TooLongError("document: 9000 tokens, expected at most 2048", field="content")
        completed = document
        rng = np.random.default_rng(settings.seed)
        for index, letter in enumerate(("T I" if settings.layout == "auto" else settings.layout).split()):
            seed = settings.seed + index
            if letter == "T":
                yield TextDelta(f"part {index} ")
                yield TextDelta(f"of seed {settings.seed}")
                completed = completed.extended(
                    Text(f"part {index} of seed {settings.seed}", generated=True, seed=seed)
                )
            else:
                yield ImageStarted(len(completed.images))
                picture = PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                yield ImageDone(picture, seed)
                completed = completed.extended(Image(picture, generated=True, seed=seed))
        yield Finished("layout", completed)


def load_echo(folder: Path, *, device: str, dtype: str, acceleration: object = None) -> EchoGenerator:
    """Stands where `load_generator` does."""
    return EchoGenerator()
