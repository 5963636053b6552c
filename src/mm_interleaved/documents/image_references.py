"""What an image reference in a record means: a file inside the allowed folder, or bytes in the record."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mm_interleaved.documents.image_sources import REMOTE_ADDRESS, content_of_data_url, decoded_base64
from mm_interleaved.documents.images import MAX_FILE_BYTES, file_kind
from mm_interleaved.documents.parts import Image
from mm_interleaved.documents.record_files import MAX_RECORD_BYTES
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import escape


class ImageStore(Protocol):
    """Whatever finds the images that records name."""

    @property
    def skip_missing(self) -> bool:
        """Leave out images that are not there."""
        ...

    def image(self, reference: Field, role: str | None = None) -> Image | None:
        """The image that a string names; None where it is missing and may be. Raises FieldError."""
        ...

    def encoded(self, reference: Field, role: str | None = None) -> Image:
        """The image in a string of base64. Raises FieldError."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Where the images of one input file may lie.

    A relative path is looked up beside the file first, then under `root`. Whatever it says, links followed,
    the file has to lie under `root`.
    """

    beside: Path
    """The folder of the input file."""
    root: Path
    """The allowed folder."""
    skip_missing: bool = False
    """Leave out images that are not there (corpora of which not all was downloaded)."""

    def image(self, reference: Field, role: str | None = None) -> Image | None:
        """The image that a string names: a path or a `data:` URL; None where it is missing and may be.

        Raises FieldError: a remote address, a path out of the folder, no such file, not a regular file, bad
        base64.
        """
        embedded = embedded_image(reference, role)
        if embedded is not None:
            return embedded
        path = self._resolved(reference)
        return None if path is None else Image(path, role=role, name=reference.text())

    def encoded(self, reference: Field, role: str | None = None) -> Image:
        """The image in a string of base64."""
        return encoded_image(reference, role)

    def _resolved(self, reference: Field) -> Path | None:
        text = reference.text()
        if not text or "\0" in text:
            reference.wrong("a path")
        root = Path(os.path.realpath(self.root))
        is_inside = False
        for folder in dict.fromkeys((self.beside, self.root)):
            path = Path(os.path.realpath(folder / text))
            if not path.is_relative_to(root):
                continue
            is_inside = True
            try:
                mode = os.stat(path).st_mode
            except OSError:
                continue
            if not stat.S_ISREG(mode):
                raise FieldError(
                    reference.path, f"{escape(text)!r} is a {file_kind(mode)}, expected a regular file"
                )
            return path
        if not is_inside:
            raise FieldError(
                reference.path,
                f"{escape(text)!r} lies outside the allowed folder {escape(str(root))} (see --image-root)",
            )
        if self.skip_missing:
            return None
        raise FieldError(reference.path, f"there is no file {escape(text)!r} in {escape(str(self.beside))}")


def embedded_image(reference: Field, role: str | None = None) -> Image | None:
    """The image in a `data:` URL; None where the string may be a name.

    Raises FieldError: a remote address, bad base64.
    """
    text = reference.text(MAX_RECORD_BYTES)
    if text.startswith("data:"):
        return Image(_data_url(reference), role=role)
    if REMOTE_ADDRESS.match(text):
        scheme = text.split(":")[0]
        raise FieldError(
            reference.path,
            f"found the address {escape(text, 60)!r}, expected a local path or a data: URL "
            f"({escape(scheme, 20)} addresses are never fetched)",
        )
    return None


def encoded_image(reference: Field, role: str | None = None) -> Image:
    """The image in a string of base64. Raises FieldError."""
    return Image(_base64(reference, reference.text(MAX_RECORD_BYTES)), role=role)


def _data_url(reference: Field) -> bytes:
    content = content_of_data_url(reference.value)
    if content is None:
        reference.wrong("a data: URL of base64, such as data:image/png;base64,...")
    return _base64(reference, content)


def _base64(reference: Field, content: str) -> bytes:
    if len(content) > MAX_FILE_BYTES * 4 // 3:
        raise FieldError(reference.path, f"found {len(content)} characters of base64, expected fewer")
    try:
        return decoded_base64(content)
    except ValueError as error:
        raise FieldError(reference.path, f"not base64 ({error})") from error
