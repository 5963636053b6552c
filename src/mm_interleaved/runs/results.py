"""The records of a run on disk, and whether they still are as they were committed.

A run appends a line of hashes to `hashes.jsonl`, then the line of the results. A record can be reused if both
are there and agree, and its images too. Nothing is opened that does not lie in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import part_records
from mm_interleaved.errors import escape
from mm_interleaved.files import is_regular_file, storage_errors

RESULTS = "results.jsonl"
HASHES = "hashes.jsonl"
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class RecordHashes:
    """What a finished record was when it was committed."""

    line: str
    """SHA-256 of its line."""
    images: Mapping[str, str]
    """SHA-256 of each image file that it names, by path."""


def image_paths(record: Mapping[str, Any]) -> list[str]:
    """The image paths that a canonical record names, in order."""
    parts = [*part_records(record), *record.get("target", ())]
    return [part["image"] for part in parts if part["type"] == "image"]


def read_results(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file of results, and its record; None where the line is damaged."""
    if not is_regular_file(path):
        return []
    with storage_errors(path, "read"):
        lines = path.read_bytes().splitlines()
    return [(line, _read_result(line)) for line in lines]


def _read_result(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        is_whole = isinstance(record["id"], str) and (
            isinstance(record["error"]["code"], str) and isinstance(record["error"]["message"], str)
            if "error" in record
            else all(isinstance(name, str) for name in image_paths(record))
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return record if is_whole else None


def problem_of(
    line: bytes,
    record: dict[str, Any] | None,
    hashes: Mapping[str, RecordHashes],
    stems: Mapping[str, str],
) -> str:
    """Why a line of the results cannot be reused; empty where it can.

    Args:
        hashes: as they were committed, by document id.
        stems: what the names of a document's images begin with, by document id.
    """
    if record is None or record["id"] not in stems:
        return "is no result"
    key = record["id"]
    if key not in hashes:
        return f"{escape(key)!r} cannot be checked ({HASHES} has no line of it)"
    if sha256_of(line + b"\n") != hashes[key].line:
        return f"{escape(key)!r} is not as it was committed"
    names = names_of(record)
    if names != [f"{IMAGES}/{stems[key]}_{index}.png" for index in range(len(names))]:
        return f"{escape(key)!r} names other images than its own"
    return ""


def changed_images(folder: Path, record: Mapping[str, Any], hashes: RecordHashes) -> list[str]:
    """Those of a record's images that are not as they were committed, or not there."""
    return [name for name in names_of(record) if file_hash(folder, name) != hashes.images.get(name)]


def committed_hashes(
    folder: Path, manifest: Mapping[str, Any], lines: Sequence[tuple[bytes, dict[str, Any] | None]]
) -> dict[str, RecordHashes]:
    """What `hashes.jsonl` says by document id, the last where it says several things; for a run that an
    earlier version finished, what its manifest says.
    """
    path = folder / HASHES
    if path.exists():
        with storage_errors(path, "read"):
            found = [_read_hashes(line) for line in path.read_bytes().splitlines()]
        return {key: hashes for key, hashes in filter(None, found)}
    outputs = manifest.get("outputs", {"records": {}, "images": {}})
    return {
        record["id"]: RecordHashes(
            sha256_of(line + b"\n"),
            {name: str(outputs["images"].get(name)) for name in names_of(record)},
        )
        for line, record in lines
        if record is not None and outputs["records"].get(record["id"]) == record_hash(record)
    }


def _read_hashes(line: bytes) -> tuple[str, RecordHashes] | None:
    """A line of `hashes.jsonl`; None where it is damaged: then its record counts as changed."""
    try:
        entry = json.loads(line)
        images = entry["images"]
        is_whole = all(isinstance(text, str) for text in (entry["id"], entry["line"], *images.values()))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return (entry["id"], RecordHashes(entry["line"], images)) if is_whole else None


def names_of(record: Mapping[str, Any]) -> list[str]:
    return [] if "error" in record else image_paths(record)


def hash_line(key: str, hashes: RecordHashes) -> bytes:
    return line_of({"id": key, "line": hashes.line, "images": dict(hashes.images)})


def file_hash(folder: Path, name: str) -> str | None:
    """SHA-256 of a regular file in a folder; None where there is none, or it would lie outside."""
    path = folder / name
    if os.path.normpath(name).startswith(("..", "/")) or not is_regular_file(path):
        return None
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return None
    with storage_errors(path, "read"):
        return sha256_of(path.read_bytes())


def record_hash(record: Mapping[str, Any]) -> str:
    # The sentence of an error names files by where they lay; its code is what a replay must reproduce.
    is_error = "error" in record
    return sha256_of(line_of({"id": record["id"], "error": record["error"]["code"]} if is_error else record))


def line_of(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
