"""OBELICS: Parquet tables of web pages; at each index of `texts` and `images` either a text or an image.

The published tables hold the images' addresses, which are never fetched here: an address is looked up in the
image folder under the SHA-256 of the address in hexadecimal digits (with `.jpg`, `.png` or `.webp`), a path
by itself. Tables that hold the images' bytes (the `Image` feature of `datasets`) are read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, Shard, attempt
from mm_interleaved.data.storage.files import is_address, open_file, stem_of
from mm_interleaved.data.storage.image_stores import found_with_images, image_store
from mm_interleaved.data.storage.manifests import check_against_manifest
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.forms.obelics import obelics_pairs
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.errors import InputError, MMInterleavedError, UsageError, escape

_COLUMNS = ("texts", "images")
_KNOWN = ("metadata", "general_metadata")
"""Columns of the published tables that are not read."""
_SUFFIXES = (".jpg", ".png", ".webp", ".jpeg", "")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ObelicsTables:
    """Pages of OBELICS."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the folder of each file."""
    min_images: int = 1
    """Pages with fewer images, of those that are there, are left out."""
    max_images: int = 30
    """Pages with more images are left out."""

    def shards(self) -> list[Shard]:
        paths = found_with_images(self.paths, self.images)
        return [Shard(path, _num_rows(path)) for path in paths]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        store = image_store(self.images, path, skip_missing=True)
        position = start - 1
        try:
            check_against_manifest(path)
            for position, group, row, values in _rows(path, start):
                place = f"{path}: row group {group}, row {row}"
                build = partial(self._document, place, f"{stem_of(path)}:{position}", store)
                yield position, attempt(place, build, Field(values), known=_KNOWN)
        except InputError as error:
            yield position + 1, BrokenItem(path, str(error).removeprefix(f"{path}: "))

    def _document(self, place: str, name: str, store: ImageStore, row: Field) -> Document | FilteredItem:
        parts, missing = _parts(row, store)
        num_images = sum(isinstance(part, Image) for part in parts)
        if num_images < self.min_images:
            return FilteredItem(place, "missing_images" if missing else "no_image")
        if num_images > self.max_images:
            return FilteredItem(place, "too_many_images")
        given = row.get("id")
        return Document(
            id=name if given is None else str(given.value),
            parts=tuple(parts),
            meta={"missing_images": missing} if missing else {},
        )


def _parts(row: Field, store: ImageStore) -> tuple[list[Part], int]:
    """The parts, and the number of images that are not there."""
    parts: list[Part] = []
    missing = 0
    for text, image in obelics_pairs(row):
        if text.value is not None:
            parts.append(Text(text.text()))
        elif (found_image := _image(image, store)) is not None:
            parts.append(found_image)
        else:
            missing += 1
    return parts, missing


def _image(reference: Field, store: ImageStore) -> Image | None:
    """An image by address, by path, or as `{"bytes", "path"}`."""
    if isinstance(reference.value, dict):
        data, path = reference.get("bytes"), reference.get("path")
        if data is not None and isinstance(data.value, bytes):
            return Image(data.value, name=reference.path if path is None else str(path.value))
        reference = reference["path"]
    text = reference.text()
    if not text.lower().startswith(("http://", "https://")):
        return store.image(reference)
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = (store.image(Field(digest + suffix, reference.path)) for suffix in _SUFFIXES)
    return next((image for image in found if image is not None), None)


def _rows(path: str, start: int) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Position, row group, row in it, and values, of the rows from `start` on."""
    with open_file(path) as file, _naming_damage(path):
        table = _opened(file, path)
        # Of the columns that say nothing that a document could hold, not even the bytes are read.
        names = [name for name in table.schema_arrow.names if name not in _KNOWN]
        first = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if first + num_rows > start:
                row = -1
                for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=names):
                    for values in batch.to_pylist():
                        row += 1
                        if first + row >= start:
                            yield first + row, group, row, values
            first += num_rows


@contextmanager
def _naming_damage(path: str) -> Generator[None, None, None]:
    try:
        yield
    except MMInterleavedError:
        raise
    except Exception as error:
        # Arrow raises nearly anything over a damaged table (ArrowInvalid, OSError, UnicodeError, ...).
        reason = escape(str(error)) or type(error).__name__
        raise InputError(f"{path}: damaged, or no table ({reason})") from error


def _num_rows(path: str) -> int | None:
    """Rows of a local table; those at addresses are not opened before they are read."""
    import_parquet()
    if is_address(path):
        return None
    try:
        with open_file(path) as file, _naming_damage(path):
            return _opened(file, path).metadata.num_rows
    except InputError:
        return None  # what is wrong with it is reported when it is read


def _opened(file: Any, path: str) -> Any:
    parquet = import_parquet()
    table = parquet.ParquetFile(file, page_checksum_verification=True)
    lacking = [name for name in _COLUMNS if name not in table.schema_arrow.names]
    if lacking:
        found = ", ".join(escape(name, 40) for name in table.schema_arrow.names)
        raise InputError(f"{path}: found the columns {found}, expected {' and '.join(lacking)} too")
    return table


def import_parquet() -> Any:
    """pyarrow's Parquet module. Raises UsageError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow: pip install 'mm-interleaved[train]'") from error
    return pyarrow.parquet
