"""What `-o` names, checked before anything is computed: a folder or a file, as the command needs it."""

from __future__ import annotations

import os
from pathlib import Path

from mm_interleaved.errors import UsageError, escape

_OF_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".html", ".htm", ".json", ".jsonl", ".txt", ".pdf")


def folder_to_write(path: Path | None) -> Path | None:
    """A folder for results, there or not. Raises UsageError for what is a file or named like one."""
    if path is None or os.path.isdir(path):
        return path
    if os.path.exists(path) or path.suffix.lower() in _OF_FILES:
        found = "a file" if os.path.exists(path) else "the name of a file"
        raise UsageError(f"-o {escape(str(path))!r}: found {found}, expected a folder", field="output")
    return path


def image_to_write(path: Path | None) -> Path | None:
    """A PNG file. Raises UsageError for a folder and for the names of other kinds of files."""
    if path is None:
        return None
    if os.path.isdir(path) or path.suffix.lower() != ".png":
        found = "a folder" if os.path.isdir(path) else "another kind of name"
        raise UsageError(f"-o {escape(str(path))!r}: found {found}, expected a file NAME.png", field="output")
    return path
