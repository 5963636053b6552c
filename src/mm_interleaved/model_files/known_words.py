"""The words of a model whose language is closed: what it was trained on, beside the model as a list.

A model with a large vocabulary of its own language has no such list, and then nothing is unknown to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mm_interleaved.errors import ModelFileError
from mm_interleaved.files import write_file

FILE_NAME = "known_words.txt"
# A digit, a run of letters, or a mark: what a text falls into between its blanks.
_WORD = re.compile(r"\d|[^\W\d_]+|[^\w\s]|_")


class KnownWords:
    """Every word, digit and mark of the texts that a model was trained on, as it was spelt there.

    Args:
        words: "Here" and "here" are two words, since they are to a tokenizer.
    """

    def __init__(self, words: Iterable[str]):
        self.words = frozenset(words)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> KnownWords:
        """The words of these texts."""
        return cls(word for text in texts for word in _WORD.findall(text))

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of texts that are not among these, each once, in the order in which they come."""
        found = dict.fromkeys(word for text in texts for word in _WORD.findall(text))
        return [word for word in found if word not in self.words]

    def save(self, folder: Path):
        """Writes `model_files.known_words.txt`, a word a line, sorted."""
        write_file(folder / FILE_NAME, "".join(f"{word}\n" for word in sorted(self.words)).encode())

    @classmethod
    def of_folder(cls, folder: Path) -> KnownWords | None:
        """What `save` wrote; None where a model has no list.

        Raises ModelFileError where the list cannot be read.
        """
        path = folder / FILE_NAME
        try:
            return cls(path.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path}: cannot be read ({error}), expected a word a line") from error
