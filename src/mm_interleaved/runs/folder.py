"""The output folder of a generation run, and what may happen to it.

    manifest.json     made out of what: model, settings, seeds, versions, hashes; written first and last
    input/            the documents as they were read, with their image files: what `replay` reads
    images/           <id>_<k>.png, the k-th image of each finished document
    hashes.jsonl      SHA-256 of each line of the results and of the images that it names, written before it
    results.jsonl     one line a document; the line is the commit, all that it names was written before it
    index.html        the page
    shares/           while several processes work on it, see `shares`

A run that was killed anywhere is finished by the same command: what has no line in the results is made again.
So is what was changed since it was committed: a line, or an image, that is not what its hash says is put
aside under another name. Nothing is read that does not lie in the folder itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Image, document_to_record
from mm_interleaved.documents.images import image_suffix, read_regular_file, to_png
from mm_interleaved.errors import InputError, MMInterleavedError, StorageError, UsageError, escape
from mm_interleaved.files import (
    append_line,
    is_real_folder,
    is_regular_file,
    locked_folder,
    make_folder,
    put_aside,
    remove_temporary_files,
    repair_tail,
    spare_name,
    storage_errors,
    write_file,
)
from mm_interleaved.runs.manifest import FORMAT, MANIFEST, read_manifest
from mm_interleaved.runs.results import (
    HASHES,
    IMAGES,
    RESULTS,
    RecordHashes,
    changed_images,
    committed_hashes,
    file_hash,
    hash_line,
    line_of,
    problem_of,
    read_results,
    record_hash,
    sha256_of,
)

PAGE = "index.html"
INPUT = "input"
SHARES = "shares"
_FILES = (RESULTS, HASHES, PAGE)
_FOLDERS = (IMAGES, INPUT, f"{INPUT}/{IMAGES}")
_OURS = (MANIFEST, *_FILES, IMAGES, INPUT, SHARES)

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
    """What was done to the model so that it generates images faster."""
    redo: Mapping[str, Any] | None = None
    """What was made again, where the run is not one of continuing documents."""
    answering: Mapping[str, Any] = field(default_factory=dict)
    """How documents are answered, where not just by being continued."""
    memory: str | None = None
    """How the model is made to fit into memory."""


@dataclass(slots=True)
class RunFolder:
    """An open run: which documents are finished, which failed, and how one more is committed."""

    path: Path
    manifest: dict[str, Any]
    documents: Sequence[Document]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Record by document id, in the order of the results file."""
    hashes: dict[str, RecordHashes] = field(default_factory=dict)
    """Of each finished record."""
    stems: dict[str, str] = field(init=False)
    """What the names of a document's images begin with, by document id."""

    def __post_init__(self):
        self.stems = file_stems([document.id for document in self.documents])

    @property
    def failed(self) -> dict[str, dict[str, Any]]:
        """The finished records that hold an error."""
        return {key: record for key, record in self.finished.items() if "error" in record}

    def pending(self) -> list[Document]:
        """The documents that have no record yet, in input order."""
        return [document for document in self.documents if document.id not in self.finished]

    def commit(self, document: Document):
        """Write a completed document: its images first, then its line."""
        images = {
            f"{IMAGES}/{self.stems[document.id]}_{index}.png": to_png(image.load())
            for index, image in enumerate(_images(document))
        }
        make_folder(self.path / IMAGES)
        for name, data in images.items():
            write_file(self.path / name, data)
        names = list(images)
        record = document_to_record(document, lambda image, index: names[index])
        self._append(record, {name: sha256_of(data) for name, data in images.items()})

    def commit_error(self, document: Document, error: MMInterleavedError):
        """Write that a document failed, and why."""
        record = {"code": error.code, "field": error.field, "message": str(error)}
        self._append({"id": document.id, "error": record}, {})

    def adopt(self, other: RunFolder):
        """Commit what another folder of the same documents holds and this one does not."""
        make_folder(self.path / IMAGES)
        for key, record in other.finished.items():
            if key in self.finished:
                continue
            images = other.hashes[key].images
            for name in images:
                write_file(self.path / name, read_regular_file(other.path / name, name))
            self._append(record, images)

    def note(self, **facts: Any):
        """Write what has become of the run into its manifest, at once."""
        self.manifest.update(facts)
        write_file(self.path / MANIFEST, _json_file(self.manifest))

    def close(self, render: Callable[[Sequence[Mapping[str, Any]]], bytes]):
        """The run is over: results in input order, the page, the manifest with all hashes.

        Args:
            render: makes the page of the records.
        """
        order = {document.id: index for index, document in enumerate(self.documents)}
        in_order = sorted(self.finished, key=order.__getitem__)
        if in_order != list(self.finished):
            self.finished = {key: self.finished[key] for key in in_order}
            self.write_all()
        page = render(list(self.finished.values()))
        write_file(self.path / PAGE, page)
        self.manifest["outputs"] = {**self.output_hashes(), "page": sha256_of(page)}
        write_file(self.path / MANIFEST, _json_file(self.manifest))

    def output_hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every record (by id) and every image file (by path), as they were committed."""
        return {
            "records": {key: record_hash(record) for key, record in self.finished.items()},
            "images": {
                name: digest for key in self.finished for name, digest in self.hashes[key].images.items()
            },
        }

    def write_all(self):
        """The finished records anew, in their order; their hashes behind them, as nothing is committed by a
        hash alone.
        """
        write_file(self.path / RESULTS, b"".join(map(line_of, self.finished.values())))
        write_file(self.path / HASHES, b"".join(hash_line(key, self.hashes[key]) for key in self.finished))

    def _append(self, record: dict[str, Any], images: Mapping[str, str]):
        line = line_of(record)
        hashes = RecordHashes(sha256_of(line), images)
        append_line(self.path / HASHES, hash_line(record["id"], hashes).rstrip(b"\n"))
        append_line(self.path / RESULTS, line.rstrip(b"\n"))
        self.finished[record["id"]], self.hashes[record["id"]] = record, hashes


@contextmanager
def open_run(
    path: Path,
    documents: Sequence[Document],
    identity: RunIdentity,
    facts: Callable[[], Mapping[str, Any]],
    *,
    new_run: bool = False,
    retry_errors: bool = False,
) -> Generator[RunFolder, None, None]:
    """Begin a run in an empty folder, or go on with the one that stands there.

    Args:
        facts: what else the manifest of a new run records (seeds, versions, threads); a rerun keeps the
            first.
        new_run: move what stands there to `earlier/<n>/` and begin anew.
        retry_errors: make failed documents again.

    Raises:
        UsageError: the folder is in use, holds something else, or another run (the differing key is named).
        InputError: its manifest is damaged.
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
        input_record = input_hashes(documents)
        manifest = _manifest_of(path)
        wanted = {**_identity_record(identity), "input": input_record}
        if manifest is None:
            manifest = {"format": FORMAT, **wanted, **facts()}
            write_file(path / MANIFEST, _json_file(manifest))
        else:
            _refuse_difference(path, manifest, {"redo": None, "answering": {}, **wanted})
        # Only now is it sure that the folder is ours, and what lies in it too.
        remove_temporary_files(path)
        _put_aside_other_kinds(path)
        _keep_input(path, documents)
        folder = RunFolder(path, manifest, documents)
        take_up(folder, retry_errors)
        yield folder


def changed_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Which of a finished run's records and files are not what its manifest says: by id, and by path.

    Raises:
        StorageError: a file is there and cannot be read.
    """
    outputs = manifest["outputs"]
    records = {record["id"]: record for _, record in read_results(path / RESULTS) if record is not None}
    changed = [
        f"record {escape(key)!r}"
        for key in {**outputs["records"], **records}
        if key not in records or record_hash(records[key]) != outputs["records"].get(key)
    ]
    changed += [escape(name) for name, digest in outputs["images"].items() if file_hash(path, name) != digest]
    # Earlier versions did not record the page.
    if "page" in outputs and file_hash(path, PAGE) != outputs["page"]:
        changed.append(PAGE)
    return changed


def check_input(path: Path, manifest: Mapping[str, Any], documents: Sequence[Document]):
    """Refuse documents, read from a run's folder, that are not those which it was made of.

    Raises:
        InputError: names the first that differs.
    """
    then, now = manifest["input"], input_hashes(documents)
    for key in {**then, **now}:
        if then.get(key) != now.get(key):
            raise InputError(
                f"{path / INPUT}: document {escape(key)!r} is not the one of the run (its text or an image "
                "has changed), expected the run's own copy of its input"
            )


def file_stem(document_id: str, *, with_hash: bool = False) -> str:
    """A document's id as the beginning of file names: harmless on every system, still one to one.

    Args:
        with_hash: add the id's hash even where the id could stand as it is.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", document_id)[:80].lstrip(".") or "document"
    is_whole = safe == document_id and not with_hash
    return safe if is_whole else f"{safe}-{sha256_of(document_id.encode())[:8]}"


def file_stems(document_ids: Sequence[str]) -> dict[str, str]:
    """The stem of each document of a run. Where ids differ in their case alone, which some disks do not
    tell apart, they get their hashes too.
    """
    alike = Counter(file_stem(name).casefold() for name in document_ids)
    return {name: file_stem(name, with_hash=alike[file_stem(name).casefold()] > 1) for name in document_ids}


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
        **({} if identity.redo is None else {"redo": dict(identity.redo)}),
        **({"answering": dict(identity.answering)} if identity.answering else {}),
        "memory": identity.memory,
    }


def input_hashes(documents: Sequence[Document]) -> dict[str, str]:
    """SHA-256 of each document by id, over its record and the bytes of its images."""

    def content_hash(image: Image, _: int) -> str:
        try:
            return sha256_of(image.encoded())
        except MMInterleavedError as error:
            return f"unreadable: {error}"

    return {
        document.id: sha256_of(line_of(document_to_record(document, content_hash))) for document in documents
    }


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
    strangers = [name for name in names if not name.startswith((".", "damaged-")) and name not in ours]
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
    """Move an earlier run's files to `earlier/<n>/`: --new-run costs nobody their images."""
    present = [path / name for name in _OURS if os.path.lexists(path / name)]
    if not present:
        return
    number = 1
    while os.path.lexists(path / "earlier" / str(number)):
        number += 1
    make_folder(path / "earlier" / str(number))
    # The manifest moves last: without it the folder would be taken for a stranger's.
    for item in sorted(present, key=lambda item: item.name == MANIFEST):
        try:
            item.rename(path / "earlier" / str(number) / item.name)
        except OSError as error:
            raise StorageError(f"{item}: cannot be moved aside ({error.strerror})") from error


def _manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None where there is no run."""
    if not os.path.lexists(path / MANIFEST):
        return None
    try:
        return read_manifest(path / MANIFEST)
    except InputError as error:
        raise InputError(
            f"{error}; --new-run puts the run aside and begins anew", field=error.field
        ) from error


def _put_aside_other_kinds(path: Path):
    """What stands where a file or a folder of ours should, and is none: a folder, a link, a pipe."""
    kinds = [(name, is_regular_file) for name in _FILES] + [(name, is_real_folder) for name in _FOLDERS]
    for name, is_right in kinds:
        if os.path.lexists(path / name) and not is_right(path / name):
            aside = put_aside(path / name)
            logger.warning("%s: is not what a run writes there, now %s", path / name, aside.name)


def _keep_input(path: Path, documents: Sequence[Document]):
    """Copy the input: image files under names by content, then the documents, which commit the copy. What of
    an earlier copy is no longer the same is written again.
    """
    make_folder(path / INPUT / IMAGES)

    def keep(image: Image, _: int) -> str:
        try:
            data = image.encoded()
        except MMInterleavedError:
            return f"{IMAGES}/unreadable-{sha256_of(str(image.source).encode())[:16]}"
        name = f"{IMAGES}/{sha256_of(data)[:24]}{image_suffix(data) or '.bin'}"
        _write_if_other(path / INPUT / name, data)
        return name

    lines = [line_of(document_to_record(document, keep)) for document in documents]
    _write_if_other(path / INPUT / "documents.jsonl", b"".join(lines))


def _write_if_other(path: Path, data: bytes):
    if os.path.lexists(path) and not is_regular_file(path):
        put_aside(path)
    with storage_errors(path, "read"):
        is_same = path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data
    if not is_same:
        write_file(path, data)


def take_up(run: RunFolder, retry_errors: bool):
    """Finished is what still is as it was committed; all else is put aside, to be made again."""
    results = run.path / RESULTS
    repair_tail(results)
    repair_tail(run.path / HASHES)
    lines = read_results(results)
    hashes = committed_hashes(run.path, run.manifest, lines)
    kept: dict[str, dict[str, Any]] = {}
    wrong = []
    for number, (line, record) in enumerate(lines, start=1):
        problem = problem_of(line, record, hashes, run.stems)
        if problem:
            wrong.append(line)
        elif record is not None:
            changed = changed_images(run.path, record, hashes[record["id"]])
            _put_aside_those_there(run.path / name for name in changed)
            problem = f"{', '.join(changed)} not as committed" if changed else ""
            if not problem and not (retry_errors and "error" in record):
                kept[record["id"]] = record
        if problem:
            logger.warning("%s:%d: %s, its document is made again", results, number, problem)
    if wrong:
        # Somebody may have changed it by hand, and want it back.
        write_file(spare_name(results), b"".join(line + b"\n" for line in wrong))
    run.finished, run.hashes = kept, {key: hashes[key] for key in kept}
    is_noted = not kept or (run.path / HASHES).exists()
    if len(kept) != len(lines) or len(kept) != len(hashes) or not is_noted:
        run.write_all()


def _put_aside_those_there(paths: Iterable[Path]):
    for path in paths:
        if os.path.lexists(path):
            put_aside(path)


def _json_file(record: Mapping[str, Any]) -> bytes:
    # An argument of the command line may be no UTF-8; as an escape it is JSON still.
    return json.dumps(record, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
