"""The API keys that a server asks for: where they are read from, and which may be one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mm_interleaved.errors import InputError, UsageError, escape

KEY_VARIABLE = "MM_INTERLEAVED_API_KEY"
"""Environment variable with a key."""


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The API keys that are given, those of a file, one a line, and that of the environment.

    Raises:
        UsageError: an empty one, or one with blanks.
        InputError: no such file, or one without keys.
    """
    keys = list(given)
    if file is not None:
        keys += _keys_of(file)
    if (variable := os.environ.get(KEY_VARIABLE)) is not None:
        keys.append(variable)
    if any(not key or not key.isascii() or any(c.isspace() for c in key) for key in keys):
        raise UsageError("api key: expected ASCII characters without blanks", field="api_key")
    return tuple(keys)


def _keys_of(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{escape(str(file))}: cannot be read as a file of keys") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"{escape(str(file))}: found no key, expected one a line")
    return keys
