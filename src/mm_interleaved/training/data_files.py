"""Which files a run reads, and what they were when it began: `data.json` beside its log.

A run that is resumed goes on at places in its files, and with the frozen weights of the model that it started
from, so they have to be the same ones. Files are distinguished by size and hash: the hash of a manifest where
one lists them, else of their contents, or, of a large corpus, of some blocks of each. Of images that lie in
files of their own, those of the first documents are checked.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mm_interleaved.data.mixture import Mixture
from mm_interleaved.data.source import Shard, Source, WholeDocuments, items_of
from mm_interleaved.data.storage.files import file_size, found_files, is_address, open_file, reading
from mm_interleaved.data.storage.manifests import listed_hash
from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError, MMInterleavedError, escape
from mm_interleaved.files import make_folder, put_aside, write_file
from mm_interleaved.model_files.hashing import model_files
from mm_interleaved.runs.ranks import Ranks

logger = logging.getLogger(__name__)

DATA_NAME = "data.json"
WHOLE_BYTES = 256 << 20
"""Corpora of up to so many bytes are hashed whole (half a second)."""
NUM_BLOCKS, BLOCK_BYTES = 8, 4096
NUM_DOCUMENTS = 1000
"""Documents of a corpus whose images are checked."""
_CHUNK_BYTES = 1 << 20
_HINT = (
    "a run goes on only with the data that it began with; begin a new one, e.g. from the model of `export`"
)


class DataFile(NamedTuple):
    """A file as a run found it."""

    name: str
    """Without its folder: a corpus may move."""
    bytes: int
    sha256: str


def check_data(mixture: Mixture, folder: Path, ranks: Ranks, *, model: Path | None = None) -> None:
    """Refuses data that was edited since the run in `folder` began; the first time, writes what it is. All
    ranks call it.

    Args:
        model: the folder of the model that the run starts from.

    Raises:
        InputError: a file is not there, or another than it was; it is named.
        StorageError: it cannot be read, or the note cannot be written.
    """
    error = None
    if ranks.is_first:
        try:
            _check(mixture, folder, model)
        except MMInterleavedError as found:
            error = found
    for problem in ranks.gather(error):
        if problem is not None:
            raise problem


def _check(mixture: Mixture, folder: Path, model: Path | None) -> None:
    shards = mixture.find_shards()
    paths = {
        f"corpora.{entry.name}": list(dict.fromkeys(_files_of(entry.source, shards[entry.name])))
        for entry in mixture.sources
        if entry.name in shards
    }
    if model is not None:
        paths["start_from"] = [str(path) for path in model_files(model)]
    now = {name: _data_files(its) for name, its in paths.items()}
    then = _read(folder / DATA_NAME)
    has_begun = any(folder.glob("step-*"))
    if has_begun and then is None:
        logger.warning("%s: not there, so whether the data was changed is not known", folder / DATA_NAME)
    if not has_begun or then is None:
        make_folder(folder)
        write_file(folder / DATA_NAME, (json.dumps(now) + "\n").encode())
        return
    for name in now.keys() & then.keys():
        _compare(name, paths[name], then[name], now[name])


def _compare(setting: str, paths: Sequence[str], then: Sequence[DataFile], now: Sequence[DataFile]) -> None:
    """Sizes first: how a corpus is hashed depends on its size."""
    for what in ("bytes", "sha256"):
        for path, before, after in zip(paths, then, now, strict=False):
            found, expected = getattr(after, what), getattr(before, what)
            if before.name == after.name and found != expected:
                problem = f"found {what} {found}, expected {expected}"
                raise InputError(f"{escape(path)}: changed since the run began: {problem}; {_HINT}")
    names, expected_names = [file.name for file in now], [file.name for file in then]
    if names != expected_names:
        differing = [pair for pair in zip(names, expected_names, strict=False) if pair[0] != pair[1]]
        first = f", the first that differs is {escape(differing[0][0])}" if differing else ""
        raise InputError(
            f"{setting}: other files than the run began with: found {len(names)}, expected "
            f"{len(expected_names)}{first}; {_HINT}"
        )


def _read(path: Path) -> Mapping[str, list[DataFile]] | None:
    """What was noted; None where there is nothing. What is no such note is put aside."""
    if not os.path.lexists(path):
        return None
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {name: [_data_file(*file) for file in files] for name, files in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        logger.warning("%s: damaged, now %s", path, put_aside(path).name)
        return None


def _data_file(name: str, size: int, sha256: str) -> DataFile:
    if not (isinstance(name, str) and type(size) is int and isinstance(sha256, str)):
        raise TypeError(f"expected a name, a size and a hash, found {name!r}, {size!r}, {sha256!r}")
    return DataFile(name, size, sha256)


def _files_of(source: Source, shards: Sequence[Shard]) -> Iterator[str]:
    """Shards, whatever else the settings of a source name, images of the first documents."""
    named = [shard.name for shard in shards if is_address(shard.name) or os.path.isfile(shard.name)]
    yield from named
    if not named:
        return
    settings: Any = source.source if isinstance(source, WholeDocuments) else source
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.name != "paths":
            yield from _named_files([value] if isinstance(value, str) else value)
    for shard in shards[:NUM_DOCUMENTS]:
        per_shard = max(1, NUM_DOCUMENTS // len(shards))
        for _, item in islice(items_of(source, shard), per_shard):
            if isinstance(item, Document):
                yield from _image_files(item)


def _named_files(values: Any) -> Iterator[str]:
    """The files, and the files of globs, among the values of a setting."""
    for value in values if isinstance(values, list | tuple) else ():
        if isinstance(value, str) and not is_address(value) and not os.path.isdir(value):
            try:
                yield from found_files(value)
            except MMInterleavedError:
                continue  # a setting that names no file


def _image_files(document: Document) -> Iterator[str]:
    for image in document.images:
        if isinstance(image.source, Path) and image.source.is_file():
            yield str(image.source)


def _data_files(paths: Sequence[str]) -> list[DataFile]:
    sizes = [file_size(path) for path in paths]
    is_small = sum(sizes) <= WHOLE_BYTES
    return [
        DataFile(os.path.basename(path), size, listed_hash(path) or _hash(path, size, is_small))
        for path, size in zip(paths, sizes, strict=True)
    ]


def _hash(path: str, size: int, is_whole: bool) -> str:
    total = hashlib.sha256()
    with open_file(path) as file, reading(path):
        if is_whole or size <= NUM_BLOCKS * BLOCK_BYTES:
            while chunk := file.read(_CHUNK_BYTES):
                total.update(chunk)
            return total.hexdigest()
        for start in _starts(size):
            file.seek(start)
            total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def _starts(size: int) -> Iterable[int]:
    """Where the blocks begin: spread over a file, its first and its last bytes among them."""
    return ((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS))
