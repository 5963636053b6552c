"""The output folder of a generation run, and what may happen to it.

    manifest.json     made out of what: model, settings, seeds, versions, hashes; written first and last
    input/            the documents as they were read, with their image files: what `replay` reads
    images/           <id>_<k>.png, the k-th image of each finished document
    results.jsonl     one line a document; the line is the commit, all that it names was written before it
    index.html        the page

A run that was killed anywhere is finished by the same command: what has no line in the results is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_interleaved.document import Document, Image, document_to_record, part_records
from mm_interleaved.errors import InputError, MMInterleavedError, StorageError, UsageError
from mm_interleaved.images import read_regular_file, to_png
from mm_interleaved.storage import (
    append_line,
    locked_folder,
    make_folder,
    remove_temporary_files,
    repair_tail,
    write_file,
)
from mm_interleaved.strict_json import describe

MANIFEST = "manifest.json"
RESULTS = "results.jsonl"
PAGE = "index.html"
FORMAT = "mm-interleaved run 1"
_OURS = (MANIFEST, RESULTS, PAGE, "images", "input")
_MANIFEST_FIELDS = {
    "model": dict, "model.name": str, "model.sha256": str, "device": str, "dtype": str,
    "settings": dict, "flags": dict, "input": dict, "threads": int, "machine": dict, "versions": dict,
}  # fmt: skip
_OUTPUT_FIELDS = {"outputs": dict, "outputs.records": dict, "outputs.images": dict}
"""Of a finished run only."""
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What makes two runs the same run. A rerun must agree with the folder in every one of these."""

    model: str
    """The model's name as given: `storyworld`, a folder or a hub id."""
    weights: str
    """SHA-256 over the model's files."""
    settings: Mapping[str, Any]
    """The run's generation settings, all of them."""
    flags: Mapping[str, Any]
    """Those given on the command line; they outrank the documents' own."""
    device: str = "auto"
    dtype: str = "auto"
    acceleration: Mapping[str, Any] = field(default_factory=dict)
    """What was done to the model so that it paints faster."""


@dataclass(slots=True)
class RunFolder:
    """An open run: which documents are finished, which failed, and how one more is committed."""

    path: Path
    manifest: dict[str, Any]
    documents: Sequence[Document]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Record by document id, in the order of the results file."""
    stems: dict[str, str] = field(init=False)
    """What the names of a document's images begin with, by document id."""

    def __post_init__(self):
        self.stems = file_stems([document.id for document in self.documents])

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        """The finished records that tell of an error."""
        return {key: record for key, record in self.finished.items() if "error" in record}

    def pending(self) -> list[Document]:
        """The documents that have no record yet, in input order."""
        return [document for document in self.documents if document.id not in self.finished]

    def commit(self, document: Document):
        """Write a completed document: its images first, then its line."""
        names = {}
        for index, image in enumerate(_images(document)):
            name = f"images/{self.stems[document.id]}_{index}.png"
            names[index] = (name, to_png(image.load()))
        make_folder(self.path / "images")
        for name, data in names.values():
            write_file(self.path / name, data)
        self._append(document_to_record(document, lambda image, index: names[index][0]))

    def commit_error(self, document: Document, error: MMInterleavedError):
        """Write that a document failed, and why."""
        record = {"code": error.code, "field": error.field, "message": str(error)}
        self._append({"id": document.id, "error": record})

    def close(self, render: Callable[[Sequence[Mapping[str, Any]]], bytes]):
        """The run is over: results in input order, the page, the manifest with all hashes.

        Args:
            render: makes the page of the records.
        """
        order = {document.id: index for index, document in enumerate(self.documents)}
        in_order = sorted(self.finished, key=order.__getitem__)
        if in_order != list(self.finished):
            self.finished = {key: self.finished[key] for key in in_order}
            write_file(self.path / RESULTS, b"".join(map(_line, self.finished.values())))
        write_file(self.path / PAGE, render(list(self.finished.values())))
        self.manifest["outputs"] = self.output_hashes()
        write_file(self.path / MANIFEST, _json_file(self.manifest))

    def output_hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every record (by id) and every image file (by path)."""
        names = [name for record in self.finished.values() for name in image_paths(record)]
        return {
            "records": {key: _record_hash(record) for key, record in self.finished.items()},
            "images": {name: _sha256((self.path / name).read_bytes()) for name in names},
        }

    def _append(self, record: dict[str, Any]):
        append_line(self.path / RESULTS, _line(record).rstrip(b"\n"))
        self.finished[record["id"]] = record


@contextmanager
def open_run(
    path: Path,
    documents: Sequence[Document],
    identity: RunIdentity,
    facts: Callable[[], Mapping[str, Any]],
    *,
    new_run: bool = False,
    retry_errors: bool = False,
) -> Iterator[RunFolder]:
    """Begin a run in an empty folder, or go on with the one that stands there.

    Args:
        facts: what else the manifest of a new run tells (seeds, versions, threads); a rerun keeps the first.
        new_run: move what stands there to `earlier/<n>/` and begin anew.
        retry_errors: make failed documents again.

    Raises:
        UsageError: the folder is in use, holds something else, or another run (the differing key is named).
        StorageError: it cannot be written.
    """
    _refuse_duplicate_ids(documents)
    # Not Path.exists, which raises where a name is too long or a folder is closed to us.
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"{path}: is a file, expected a folder to write results to")
    # Before anything of ours stands in it, the lock included.
    if os.path.isdir(path):
        _refuse_foreign_folder(path, new_run)
    make_folder(path)
    with locked_folder(path):
        if new_run:
            _put_aside(path)
        input_record = _input_record(documents)
        manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).exists() else None
        if manifest is None:
            manifest = {"format": FORMAT, **_identity_record(identity), "input": input_record, **facts()}
            write_file(path / MANIFEST, _json_file(manifest))
        else:
            _refuse_difference(path, manifest, {**_identity_record(identity), "input": input_record})
        # Only now is it sure that the folder is ours, and what lies in it too.
        remove_temporary_files(path)
        _keep_input(path, documents)
        folder = RunFolder(path, manifest, documents)
        folder.finished = _finished_records(path, {document.id for document in documents}, retry_errors)
        yield folder


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest. Raises InputError where the file is missing or is something else."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected the manifest of a run") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}), expected the manifest of a run") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format {found!r}, expected {FORMAT!r}", field="format")
    for name, kind in {**_MANIFEST_FIELDS, **(_OUTPUT_FIELDS if "outputs" in manifest else {})}.items():
        value = manifest
        for key in name.split("."):
            value = value.get(key)
        if not isinstance(value, kind):
            raise InputError(
                f"{path}: {name}: found {describe(value)}, expected what a run writes there", field=name
            )
    if manifest["threads"] < 1:
        raise InputError(f"{path}: threads: found {manifest['threads']}, expected 1 or more", field="threads")
    return manifest


def file_stem(document_id: str, *, with_hash: bool = False) -> str:
    """A document's id as the beginning of file names: harmless on every system, still one to one.

    Args:
        with_hash: add the id's hash even where the id could stand as it is.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", document_id)[:80].lstrip(".") or "document"
    is_whole = safe == document_id and not with_hash
    return safe if is_whole else f"{safe}-{_sha256(document_id.encode())[:8]}"


def file_stems(document_ids: Sequence[str]) -> dict[str, str]:
    """The stem of each document of a run. Where ids differ in their case alone, which some disks do not
    tell apart, they get their hashes too.
    """
    alike = Counter(file_stem(name).casefold() for name in document_ids)
    return {name: file_stem(name, with_hash=alike[file_stem(name).casefold()] > 1) for name in document_ids}


def image_paths(record: Mapping[str, Any]) -> list[str]:
    """The image paths that a canonical record names, in order."""
    parts = [*part_records(record), *record.get("target", ())]
    return [part["image"] for part in parts if part["type"] == "image"]


def _images(document: Document) -> list[Image]:
    return [part for part in (*document.parts, *document.target) if isinstance(part, Image)]


def _identity_record(identity: RunIdentity) -> dict[str, Any]:
    return {
        "model": {"name": identity.model, "sha256": identity.weights},
        "device": identity.device,
        "dtype": identity.dtype,
        "settings": dict(identity.settings),
        "flags": dict(identity.flags),
        "acceleration": dict(identity.acceleration),
    }


def _input_record(documents: Sequence[Document]) -> dict[str, str]:
    """SHA-256 of each document by id, over its record and the bytes of its images."""

    def content_hash(image: Image, _: int) -> str:
        try:
            return _sha256(_encoded(image))
        except MMInterleavedError as error:
            return f"unreadable: {error}"

    return {document.id: _sha256(_line(document_to_record(document, content_hash))) for document in documents}


def _refuse_duplicate_ids(documents: Sequence[Document]):
    seen: dict[str, int] = {}
    for number, document in enumerate(documents, start=1):
        first = seen.setdefault(document.id, number)
        if first != number:
            raise InputError(f"documents {first} and {number} have the same id {document.id!r}", field="id")


def _refuse_foreign_folder(path: Path, new_run: bool):
    """A folder with other things and no manifest is somebody's; --new-run puts aside what is ours."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    if MANIFEST in names and not new_run:
        return
    ours = ("earlier", *(_OURS if new_run else ()))
    strangers = [name for name in names if not name.startswith(".") and name not in ours]
    if strangers:
        raise UsageError(
            f"{path}: is not empty ({strangers[0]!r} is there) and holds no {MANIFEST} of a run; "
            "choose another folder with -o"
        )


def _refuse_difference(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]):
    """A rerun must be the same run: the first key that differs is named, with both values."""
    before, now = (dict(_flat({key: record.get(key) for key in wanted})) for record in (manifest, wanted))
    for key in [*now, *(key for key in before if key not in now)]:
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{path}: holds another run ({key} was {_shown(before.get(key))}, "
                f"is now {_shown(now.get(key))}); choose another folder with -o or use --new-run",
                field=key,
            )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value, ensure_ascii=False)
    return f"{text[:20]}…" if len(text) > 40 else text


def _put_aside(path: Path):
    """Move an earlier run's files to `earlier/<n>/`: --new-run costs nobody their pictures."""
    present = [path / name for name in _OURS if (path / name).exists()]
    if not present:
        return
    number = 1
    while (path / "earlier" / str(number)).exists():
        number += 1
    make_folder(path / "earlier" / str(number))
    # The manifest moves last: without it the folder would be taken for a stranger's.
    for item in sorted(present, key=lambda item: item.name == MANIFEST):
        try:
            item.rename(path / "earlier" / str(number) / item.name)
        except OSError as error:
            raise StorageError(f"{item}: cannot be moved aside ({error.strerror})") from error


def _keep_input(path: Path, documents: Sequence[Document]):
    """Copy the input: image files under names by content, then the documents, which commit the copy."""
    if (path / "input" / "documents.jsonl").exists():
        return
    make_folder(path / "input" / "images")

    def keep(image: Image, _: int) -> str:
        try:
            data = _encoded(image)
        except MMInterleavedError:
            return f"images/unreadable-{_sha256(str(image.source).encode())[:16]}"
        name = f"images/{_sha256(data)[:24]}{_suffix(data)}"
        if not (path / "input" / name).exists():
            write_file(path / "input" / name, data)
        return name

    lines = [_line(document_to_record(document, keep)) for document in documents]
    write_file(path / "input" / "documents.jsonl", b"".join(lines))


def _finished_records(path: Path, ids: set[str], retry_errors: bool) -> dict[str, dict[str, Any]]:
    """The records that still hold: known id, images there, and no error where those are to be tried again."""
    results = path / RESULTS
    repair_tail(results)
    lines = results.read_bytes().splitlines() if results.exists() else []
    records = {}
    for number, line in enumerate(lines, start=1):
        record = _read_result(line)
        if record is None:
            logger.warning("%s:%d: is no result, its document is made again", results, number)
        else:
            records[record["id"]] = record
    kept = {
        key: record
        for key, record in records.items()
        if key in ids
        and all((path / name).exists() for name in image_paths(record))
        and not (retry_errors and "error" in record)
    }
    if len(kept) != len(lines):
        write_file(results, b"".join(map(_line, kept.values())))
    return kept


def _read_result(line: bytes) -> dict[str, Any] | None:
    """The record of a line of results; None where the line is damaged."""
    try:
        record = json.loads(line)
        is_whole = isinstance(record["id"], str) and (
            isinstance(record["error"]["code"], str)
            if "error" in record
            else all(isinstance(name, str) for name in image_paths(record))
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return record if is_whole else None


def _encoded(image: Image) -> bytes:
    if isinstance(image.source, bytes):
        return image.source
    if isinstance(image.source, Path):
        return read_regular_file(image.source, image.name)
    return to_png(image.load())


def _suffix(data: bytes) -> str:
    return next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".bin")


def _record_hash(record: Mapping[str, Any]) -> str:
    # The sentence of an error names files by where they lay; its code is what a replay must reproduce.
    is_error = "error" in record
    return _sha256(_line({"id": record["id"], "error": record["error"]["code"]} if is_error else record))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _json_file(record: Mapping[str, Any]) -> bytes:
    # An argument of the command line may be no UTF-8; as an escape it is JSON still.
    return json.dumps(record, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
