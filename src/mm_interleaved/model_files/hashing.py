"""One hash of a model's folder, for manifests; loads neither torch nor transformers."""

import hashlib
from pathlib import Path

from mm_interleaved.model_files.known_words import FILE_NAME
from mm_interleaved.model_files.resolve import ALL_FILES

_SUFFIXES = tuple(pattern.removeprefix("*") for pattern in ALL_FILES)


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files: the same hash, the same output."""
    total = hashlib.sha256()
    for path in model_files(folder):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder on which its output depends, sorted."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        # The list of known words makes warnings, and no output.
        if path.suffix in _SUFFIXES and path.name != FILE_NAME and path.is_file()
    ]
