"""What can go wrong, and with which exit code the command line ends.

A message is one sentence a user can act on: where (file, line or field), what was found, what was expected.
`field` is the path of the value inside the record (`content[2].image`) and `code` the short word that goes
into a failed record of the results, so that programs need not parse the sentence.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from typing import Any


class MMInterleavedError(Exception):
    """Base of all errors that a user of this package can cause."""

    exit_code = 1
    code = "error"

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


class UsageError(MMInterleavedError):
    """A wrong argument, flag or configuration."""

    exit_code = 2
    code = "usage"


class InputError(MMInterleavedError):
    """Input data that is missing, malformed or refused."""

    exit_code = 3
    code = "input"


class ImageError(InputError):
    """An image that cannot be read: its record fails, the others go on."""

    code = "image"


class TooLongError(InputError):
    """A document that does not fit the model: its record fails, the others go on."""

    code = "too_long"


class ModelFileError(MMInterleavedError, ValueError):
    """Model files that are missing, damaged, unsafe, of the wrong shape, or of different models.

    A ValueError too, as users of transformers' `from_pretrained` expect.
    """

    exit_code = 4
    code = "model"


class NumericalError(MMInterleavedError):
    """A loss or an output that is not finite."""

    exit_code = 5
    code = "numerical"


class StorageError(MMInterleavedError):
    """A disk that is full, read-only or failing; a memory that a model does not fit into."""

    exit_code = 6
    code = "storage"


class SomeFailedError(MMInterleavedError):
    """Documents of several failed, each by an error of its own; the others are completed.

    Attributes:
        completed: the completed documents, by their place among those given.
        errors: what was wrong with each of the others, by place.
    """

    exit_code = 7
    code = "some_failed"

    def __init__(self, completed: Mapping[int, Any], errors: Mapping[int, MMInterleavedError]):
        first = min(errors)
        super().__init__(
            f"{len(errors)} of {len(completed) + len(errors)} documents failed, the first at place {first}: "
            f"{errors[first]}"
        )
        self.completed, self.errors = completed, errors


def escape(text: str, limit: int = 120) -> str:
    """`text` made safe for a line of a log: control and direction characters escaped, cut at `limit`."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "start new thread", "failed to map segment",
    "could not create a primitive", "bad_alloc",
)  # fmt: skip
"""Words of those who have no class for it: PyTorch, threads, the loader of libraries, writers in Rust."""


def memory_wanted(error: BaseException) -> str | None:
    """What there was no memory for, in a few words; None where an error is of another kind."""
    text = str(error)
    is_meant = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not is_meant and not any(words in text.lower() for words in _NO_MEMORY):
        return None
    size = re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    more = f" (no room for {size[1]} {size[2]} more)" if size else ""
    return f"the memory of this machine or its GPU is full{more}"
