"""What the server must know of the model before a request goes to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mm_interleaved.documents.document import Document
from mm_interleaved.generation.settings import GenerationSettings, settings_for

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator


class Admission(Protocol):
    """A model, or a stand-in for one."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the context."""
        ...

    def settings(self, document: Document, given: Mapping[str, Any]) -> GenerationSettings:
        """Complete settings of a document. Raises InputError or UsageError."""
        ...

    def size_for(self, ratio: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a ratio of width to height, in about as many pixels as the model knows."""
        ...


class ModelAdmission:
    """A model that is loaded."""

    def __init__(self, generator: InterleavedGenerator):
        self._model = generator.model
        self._image_tokens = 1 + generator.processor.vocabulary.num_slots

    @property
    def image_tokens(self) -> int:
        """See `Admission`."""
        return self._image_tokens

    def settings(self, document: Document, given: Mapping[str, Any]) -> GenerationSettings:
        """See `Admission`."""
        from mm_interleaved.generation.defaults import defaults_of

        return settings_for(document, defaults_of(self._model), given)

    def size_for(self, ratio: tuple[int, int]) -> tuple[int, int]:
        """See `Admission`."""
        from mm_interleaved.generation.diffusion import default_size

        decoder = self._model.image_decoder
        if decoder is None:
            return 0, 0
        height, width = default_size(decoder)
        # Each level of the U-Net halves the latents: so no row or column is left over.
        step = decoder.latent_factor * 2 ** (len(decoder.unet.config.block_out_channels) - 1)
        wide = (height * width * ratio[0] / ratio[1]) ** 0.5
        return _rounded(height * width / wide, step), _rounded(wide, step)


def _rounded(side: float, step: int) -> int:
    return max(1, round(side / step)) * step
