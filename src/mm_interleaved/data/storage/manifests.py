"""Manifests: `shards.json` beside the files of a corpus states how long each is and what its hash is.

Where there is one, a file that was cut, changed or only half downloaded is refused by name. Without one, only
what the format itself checks is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from mm_interleaved.data.storage.files import (
    address_below,
    file_exists,
    file_size,
    fingerprint,
    folder_of,
    is_address,
    name_of,
    open_file,
    reading,
)
from mm_interleaved.documents.strict_json import Field, FieldError, parse_strict
from mm_interleaved.errors import InputError, escape

logger = logging.getLogger(__name__)

MANIFEST = "shards.json"
_CHUNK_BYTES = 1 << 20
_CHECKED = (".json", ".zip", ".gz")
"""Ends of names of files whose format notices where they were cut."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a manifest records of one file."""

    bytes: int
    sha256: str


def check_against_manifest(path: str):
    """Compares a file with its entry in the manifest beside it, if it has one; its hash once a process.

    Raises:
        InputError: another size or hash, or a manifest that cannot be read.
    """
    entry = _entries(folder_of(path)).get(name_of(path))
    if entry is None:
        return
    size = file_size(path)
    found = f"{size} bytes" if size != entry.bytes else f"SHA-256 {_sha256(fingerprint(path))}"
    expected = f"{entry.bytes} bytes" if size != entry.bytes else f"SHA-256 {entry.sha256}"
    if found != expected:
        raise InputError(f"{escape(path)}: found {found}, expected {expected} as in {MANIFEST}")


def listed_hash(path: str) -> str | None:
    """The SHA-256 of a file as the manifest beside it has it; None where none lists it."""
    entry = _entries(folder_of(path)).get(os.path.basename(path))
    return None if entry is None else entry.sha256


def warn_of_unlisted(paths: Sequence[str]):
    """Logs once for all files that no manifest lists that nothing would show if they were cut or changed."""
    paths = [path for path in paths if not name_of(path).lower().endswith(_CHECKED)]
    listed = {folder: _entries(folder) for folder in dict.fromkeys(map(folder_of, paths))}
    unlisted = [path for path in paths if name_of(path) not in listed[folder_of(path)]]
    if unlisted:
        logger.warning(
            "%d file(s) without %s, %s first: a cut between records and changed bits go unnoticed "
            "(see data check --write-manifest)",
            len(unlisted),
            MANIFEST,
            escape(unlisted[0]),
        )


def manifest_of(folder: str, paths: Sequence[str]) -> dict[str, Any]:
    """The manifest of files of one folder, to be written there; what it lists already stays."""
    entries = dict(_entries(folder))
    for path in paths:
        entries[name_of(path)] = FileEntry(file_size(path), _sha256(fingerprint(path)))
    return {"shards": {name: asdict(entry) for name, entry in sorted(entries.items())}}


def _entries(folder: str) -> Mapping[str, FileEntry]:
    path = address_below(folder, MANIFEST) if is_address(folder) else f"{folder}/{MANIFEST}"
    return _read_entries(*fingerprint(path)) if file_exists(path) else {}


# By size and time of change too: a manifest that was written anew is read anew.
@lru_cache(maxsize=64)
def _read_entries(path: str, size: int, changed: int) -> Mapping[str, FileEntry]:
    with open_file(path) as file, reading(path):
        data = file.read()
    try:
        shards = Field(parse_strict(data.decode("utf-8", "replace"), path))["shards"]
        return {
            name: FileEntry(
                shards[name]["bytes"].integer(0, 1 << 62), shards[name]["sha256"].text(64).lower()
            )
            for name in shards.object()
        }
    except FieldError as error:
        raise error.at(path) from error


@lru_cache(maxsize=4096)
def _sha256(key: tuple[str, int, int]) -> str:
    digest = hashlib.sha256()
    with open_file(key[0]) as file, reading(key[0]):
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as the contents of its file."""
    return (json.dumps(manifest, indent=1) + "\n").encode()
