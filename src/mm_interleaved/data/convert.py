"""Any source as our canonical JSONL, its images copied beside the file or named where they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from mm_interleaved.data.source import BrokenItem, FilteredItem, Shard, Source, items_of, shards_of
from mm_interleaved.documents.document import Document, Image, document_to_record
from mm_interleaved.documents.images import (
    FORMAT_NAMES,
    describe_bytes,
    image_suffix,
    read_regular_file,
    to_png,
    upright_size,
)
from mm_interleaved.errors import ImageError, InputError, escape
from mm_interleaved.files import (
    is_real_folder,
    is_regular_file,
    make_folder,
    remove_temporary_files,
    storage_errors,
    whole_file,
    write_file,
)


@dataclass(slots=True)
class Conversion:
    """What became of the items of a source."""

    num_documents: int = 0
    num_broken: int = 0
    num_renamed: int = 0
    """Documents whose id an earlier one had; `#2` and so on is put behind it."""
    filtered: Counter[str] = field(default_factory=Counter)


def convert_source(
    source: Source,
    out: Path,
    shards: Sequence[Shard] | None = None,
    *,
    copies_images: bool = True,
    skips_broken: bool = False,
    report: Callable[[BrokenItem | Document | FilteredItem], None] = lambda item: None,
) -> Conversion:
    """Writes the documents of a source, in its order; the file is whole or not there.

    Args:
        shards: those of the source, where they are known already.
        copies_images: put images that do not lie in the folder of `out` into `images/` there, as they are;
            otherwise they are named by their absolute paths (those out of tars and tables are copied anyway).
        skips_broken: leave out what is broken; otherwise the first such item ends it all.
        report: is called with each item when it is done.

    Raises:
        InputError: a broken item, or no document at all.
        StorageError: the disk failed.
    """
    done = Conversion()
    ids: Counter[str] = Counter()
    make_folder(out.parent)
    if is_real_folder(out.parent / "images"):
        remove_temporary_files(out.parent / "images")
    images = _Images(out, copies_images)
    try:
        with whole_file(out) as file:
            for shard in shards_of(source) if shards is None else shards:
                for _, item in items_of(source, shard):
                    if isinstance(item, Document):
                        document = _with_own_id(item, ids)
                        done.num_renamed += document is not item
                        written = _line(document, images)
                        if isinstance(written, bytes):
                            file.write(written)
                            done.num_documents += 1
                        else:
                            item = written
                    if isinstance(item, FilteredItem):
                        done.filtered[item.rule] += 1
                    if isinstance(item, BrokenItem):
                        if not skips_broken:
                            raise InputError(
                                f"{item} (--skip-broken leaves such items out)", field=item.field
                            )
                        done.num_broken += 1
                    report(item)
            if not done.num_documents:
                raise InputError(f"{out}: found no document to write, expected at least one")
    except BaseException:
        images.take_back()
        raise
    return done


def write_lines(out: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records as lines of JSON, all or none; returns how many."""
    make_folder(out.parent)
    count = 0
    with whole_file(out) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _with_own_id(document: Document, ids: Counter[str]) -> Document:
    ids[document.id] += 1
    number = ids[document.id]
    return document if number == 1 else replace(document, id=f"{document.id}#{number}")


def _line(document: Document, images: _Images) -> bytes | BrokenItem:
    try:
        record = document_to_record(document, images)
    except ImageError as error:
        return BrokenItem(f"document {document.id!r}", str(error))
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


class _Images:
    """Says where images stand relative to a file, and copies those that shall stand beside it."""

    def __init__(self, out: Path, copies: bool):
        self.folder = Path(os.path.realpath(out.parent))
        self.copies = copies
        self.written: list[Path] = []

    def __call__(self, image: Image, index: int) -> str:
        source = image.source
        if isinstance(source, Path):
            path = Path(os.path.realpath(source))
            if path.is_relative_to(self.folder):
                return path.relative_to(self.folder).as_posix()
            if not self.copies:
                return path.as_posix()
            source = read_regular_file(path, image.name)
        if isinstance(source, PILImage.Image):
            source = to_png(source)
        return self._copied(source, image.name)

    def _copied(self, data: bytes, name: str | None) -> str:
        suffix = image_suffix(data)
        if suffix is None:
            found = describe_bytes(data)
            raise ImageError(f"image {escape(name or 'data')!r}: found {found}, expected {FORMAT_NAMES}")
        # Bytes that only begin like an image are none.
        upright_size(data, name=name)
        # By its contents, so that an image of many documents is copied once, and the same conversion gives
        # the same names again.
        place = f"images/{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        path = self.folder / place
        if not self._is_there(path, data):
            make_folder(path.parent)
            write_file(path, data)
            self.written.append(path)
        return place

    def _is_there(self, path: Path, data: bytes) -> bool:
        """Whether an earlier conversion, or this one, has copied it; its name alone could stand for a cut
        file.
        """
        with storage_errors(path, "read"):
            return is_regular_file(path) and path.stat().st_size == len(data) and path.read_bytes() == data

    def take_back(self):
        """Removes what was copied."""
        for path in self.written:
            path.unlink(missing_ok=True)
