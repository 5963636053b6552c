"""Where the images of a corpus lie: a folder, an address, or tars; all hand out references by name.

A local image is named by its path and opened later, through the one guard of `images.py`; what comes out of a
tar or over a network is fetched when its document is read, as the bytes of the file, undecoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_interleaved.data.storage.files import (
    address_below,
    file_exists,
    file_size,
    fingerprint,
    folder_of,
    found_files,
    is_address,
    local_path_of,
    open_file,
    reading,
)
from mm_interleaved.data.storage.manifests import warn_of_unlisted
from mm_interleaved.data.storage.tar_files import member_bytes, tar_index
from mm_interleaved.documents.document import Image
from mm_interleaved.documents.image_references import ImageFolder, ImageStore, embedded_image, encoded_image
from mm_interleaved.documents.images import MAX_FILE_BYTES
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError, UsageError, escape

_ANNOTATION_FOLDERS = ("annotations", "Annotations")


def image_store(images: str | None, annotations: str, *, skip_missing: bool = False) -> ImageStore:
    """The images of a corpus.

    Args:
        images: a folder, an address, or tars (a path, glob or address that ends with `.tar`). None: the
            folder of the annotations, or the one above it if that is called `annotations`.
        annotations: the file whose records name the images.
        skip_missing: say None for an image that is not there, instead of raising.

    Raises:
        UsageError: there is no such folder.
    """
    if images is not None and images.endswith(".tar"):
        return TarImages(tuple(found_files(images)), skip_missing)
    beside = folder_of(annotations)
    if images is None:
        is_below = beside.rsplit("/", 1)[-1] in _ANNOTATION_FOLDERS
        images = beside if not is_below else folder_of(beside)
    for scheme in ("file://", "local://"):
        images = images[len(scheme) :] if images.lower().startswith(scheme) else images
    if is_address(images):
        return AddressedImages(images, skip_missing)
    if not os.path.isdir(images):
        raise UsageError(f"{escape(images)}: there is no such folder, expected the one of the images")
    return ImageFolder(Path(images if is_address(beside) else beside), Path(images), skip_missing)


def found_with_images(paths: str | Sequence[str], images: str | None) -> list[str]:
    """The files that patterns name, where there is a place for their images, too.

    Raises:
        UsageError, InputError: as `found_files` and `image_store` do.
    """
    found = found_files(paths)
    image_store(images, found[0])
    warn_of_unlisted(found)
    return found


@dataclass(frozen=True, slots=True)
class AddressedImages:
    """Images below an address of fsspec."""

    address: str
    skip_missing: bool = False

    def image(self, reference: Field, role: str | None = None) -> Image | None:
        """The image in the record, or the file of that name, fetched."""
        if (embedded := embedded_image(reference, role)) is not None:
            return embedded
        name = _checked_name(reference)
        path = address_below(self.address, name)
        self._check_inside(reference, path)
        if not file_exists(path):
            return _missing(reference, self.address, self.skip_missing)
        size = file_size(path)
        if size > MAX_FILE_BYTES:
            raise FieldError(reference.path, f"found {size} bytes, expected at most {MAX_FILE_BYTES}")
        with open_file(path) as file, reading(path):
            return Image(file.read(), role=role, name=name)

    def _check_inside(self, reference: Field, path: str):
        """No link on this machine's disk leads out of the folder, whatever the address goes through."""
        folder, local = local_path_of(self.address), local_path_of(path)
        if folder is None or local is None:
            return
        if not Path(os.path.realpath(local)).is_relative_to(os.path.realpath(folder)):
            raise FieldError(
                reference.path,
                f"{escape(reference.value)!r} lies outside the allowed folder {escape(folder)}",
            )

    def encoded(self, reference: Field, role: str | None = None) -> Image:
        """The image in a string of base64."""
        return encoded_image(reference, role)


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images in tars: by the whole name of a member, or by its last part."""

    paths: tuple[str, ...]
    skip_missing: bool = False

    def image(self, reference: Field, role: str | None = None) -> Image | None:
        """The image in the record, or the member of the first tar that has it."""
        if (embedded := embedded_image(reference, role)) is not None:
            return embedded
        name = _checked_name(reference)
        for path in self.paths:
            try:
                member = tar_index(fingerprint(path)).get(name)
                if member is None:
                    continue
                if member.problem:
                    raise FieldError(reference.path, f"{path}: {escape(name)!r} {member.problem}")
                with open_file(path) as file:
                    return Image(member_bytes(file, member, path), role=role, name=name)
            except InputError as error:
                raise FieldError(reference.path, str(error)) from error
        return _missing(reference, ", ".join(self.paths), self.skip_missing)

    def encoded(self, reference: Field, role: str | None = None) -> Image:
        """The image in a string of base64."""
        return encoded_image(reference, role)


def first_image(store: ImageStore, names: Sequence[str], path: str, role: str | None = None) -> Image:
    """The image under the first of several names that it may have, in the store or in its folder `images`.

    Args:
        store: one that skips what is missing.
        path: the field of the record that the names were made from.

    Raises:
        FieldError: there is none.
    """
    names = [folder + name for name in names for folder in ("", "images/")]
    for name in names:
        image = store.image(Field(name, path), role)
        if image is not None:
            return image
    tried = " or ".join(escape(name, 80) for name in names if not name.startswith("images/images/"))
    raise FieldError(path, f"there is no image file {tried}")


def _checked_name(reference: Field) -> str:
    name = reference.text().removeprefix("./")
    is_outside = name.startswith("/") or ".." in name.split("/") or "::" in name or "://" in name
    if not name or is_outside or "\0" in name:
        reference.wrong("the name of an image file")
    return name


def _missing(reference: Field, where: str, skip_missing: bool) -> None:
    if not skip_missing:
        raise FieldError(reference.path, f"there is no file {escape(reference.value)!r} in {escape(where)}")
