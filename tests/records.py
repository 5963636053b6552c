"""Documents of single records, as tests have them at hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.formats import read_record
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.strict_json import Field


def document_from_record(
    record: Mapping[str, Any], folder: str | Path = ".", *, image_root: str | Path | None = None
) -> Document:
    """The document of one record that is already parsed; its image paths are relative to `folder`."""
    images = ImageFolder(Path(folder), Path(folder if image_root is None else image_root))
    return read_record(Record("record", 1, Field(dict(record))), images)
