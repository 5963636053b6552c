"""What a generator warns of, each thing once: words and sizes that its model was not trained on."""

import logging
from collections.abc import Iterable

from mm_interleaved.errors import escape
from mm_interleaved.model_files.known_words import FILE_NAME, KnownWords

logger = logging.getLogger(__name__)

_WORDS_NAMED = 20
"""Unknown words that a warning names."""


class Notices:
    """Remembers what was warned of; nothing that is generated depends on it.

    Args:
        known_words: None where any word may be known.
    """

    def __init__(self, known_words: KnownWords | None):
        self.known_words = known_words
        self._words: set[str] = set()
        self._sizes: set[tuple[int, int]] = set()

    def warn_of_words(self, texts: Iterable[str]) -> None:
        """Warns of words in texts that the model was not trained on."""
        if self.known_words is None:
            return
        words = [word for word in self.known_words.unknown(texts) if word not in self._words]
        if words:
            self._words.update(words)
            more = f" and {len(words) - _WORDS_NAMED} more" if len(words) > _WORDS_NAMED else ""
            logger.warning(
                "the model was not trained on these words and takes them for noise: %s%s; it knows %d words, "
                "its %s lists them",
                escape(", ".join(words[:_WORDS_NAMED]), 1000),
                more,
                len(self.known_words.words),
                FILE_NAME,
            )

    def warn_of_size(self, size: tuple[int, int], trained: tuple[int, int]) -> None:
        """Warns of images that are not of the size that the model was trained on.

        Args:
            size, trained: height and width in pixels.
        """
        if size != trained and size not in self._sizes:
            self._sizes.add(size)
            logger.warning(
                "images of %d by %d pixels (width, height) are asked for; the model was trained on %d by %d "
                "and generates others worse",
                *reversed(size),
                *reversed(trained),
            )
