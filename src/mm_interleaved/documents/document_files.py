"""Files of documents: read in every form of record that `formats` knows, written in the canonical one.

The whole file is read and checked before anything is returned.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mm_interleaved.documents.document import Document, Image, ImagePath, document_to_record
from mm_interleaved.documents.formats import read_record
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.images import to_png
from mm_interleaved.documents.record_files import read_records
from mm_interleaved.documents.session_files import SESSION
from mm_interleaved.errors import InputError, escape
from mm_interleaved.files import make_folder, write_file

logger = logging.getLogger(__name__)


def read_documents(
    path: str | Path, *, image_root: str | Path | None = None, skip_missing_images: bool = False
) -> list[Document]:
    """All documents of a `.json` or `.jsonl` file, in order. Images are located, not opened.

    Of a session (`session.json`, see `Document.save`) the one that it shows, as far as it is whole; what is
    lost is logged.

    Args:
        image_root: folder that bounds all image paths; the file's own folder by default.
        skip_missing_images: leave out images whose files are absent instead of refusing the file.

    Raises:
        InputError: anything wrong, anywhere in the file.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if image_root is not None and not os.path.isdir(root):
        raise InputError(f"{root}: there is no such folder, expected the one that holds the images")
    if path.name == SESSION:
        documents = [Document.load(path, image_root=root)]
        _log_remarks(documents)
        return documents
    folder = ImageFolder(path.parent, root, skip_missing_images)
    documents: list[Document] = []
    places: dict[str, str] = {}
    for record in read_records(path):
        document = read_record(record, folder)
        place = document.place if document.place != str(path) else f"{path}: [{record.number - 1}]"
        if document.id in places:
            raise InputError(
                f"{place}: id: found {escape(document.id)!r}, which {places[document.id]} already has",
                field="id",
            )
        places[document.id] = place
        documents.append(document)
    if not documents:
        raise InputError(f"{path}: found no document, expected at least one")
    _log_remarks(documents)
    return documents


def _log_remarks(documents: Sequence[Document]):
    """Logs once for each remark how many documents carry it, and where the first one stands."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        for remark in document.remarks:
            found.setdefault(remark, []).append(document)
    for remark, with_it in found.items():
        first = with_it[0]
        logger.warning(
            "%s: document %r: %s (%d of %d documents)",
            first.place,
            first.id,
            escape(remark),
            len(with_it),
            len(documents),
        )


def write_documents(path: str | Path, documents: Iterable[Document], image_path: ImagePath | None = None):
    """Writes documents in the canonical form, one a line, the file whole or not at all.

    Args:
        image_path: as for `document_to_record`. By default a file under the new file's folder is named by its
            relative path; any other image is written to `images/<name of the file>_<n>.png` beside it, over
            no other image that stands there. What fails leaves no image behind.
    """
    path = Path(path)
    choose = image_path or _ImageWriter(path)
    try:
        records = [document_to_record(document, choose) for document in documents]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_file(path, "".join(lines).encode("utf-8"))
    except BaseException:
        if isinstance(choose, _ImageWriter):
            choose.take_back()
        raise


class _ImageWriter:
    """Says where images stand relative to a file, and writes those that stand nowhere yet."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self.written: list[Path] = []

    def __call__(self, image: Image, index: int) -> str:
        folder = Path(os.path.realpath(self.path.parent))
        if isinstance(image.source, Path):
            source = Path(os.path.realpath(image.source))
            if source.is_relative_to(folder):
                return source.relative_to(folder).as_posix()
        data = to_png(image.load())
        while True:
            name = f"images/{self.path.stem}_{self.count}.png"
            self.count += 1
            if not (folder / name).exists():
                break
            # Written by an earlier conversion: the same command gives the same names again.
            if (folder / name).is_file() and (folder / name).read_bytes() == data:
                return name
        make_folder(folder / "images")
        write_file(folder / name, data)
        self.written.append(folder / name)
        return name

    def take_back(self):
        """Removes what this writer wrote."""
        for path in self.written:
            path.unlink(missing_ok=True)
