"""Captions of COCO, Flickr30k and NoCaps: tables of images and captions.

Read are COCO's own form (`{"images", "annotations"}`), Karpathy's lists of image and caption
(`coco_karpathy_*.json`), and Karpathy's data set files (`{"images": [{"filename", "sentences", "split"}]}`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from mm_interleaved.data.prompts import CAPTION, TaskPrompt
from mm_interleaved.data.sources.files import fingerprint, stem_of
from mm_interleaved.data.sources.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.sources.records import REMEMBERED_TABLES, read_table
from mm_interleaved.data.sources.source import Item, Shard, attempt
from mm_interleaved.document import Document, Text
from mm_interleaved.errors import InputError
from mm_interleaved.image_references import ImageStore
from mm_interleaved.strict_json import Field, FieldError


@dataclass(frozen=True, slots=True)
class _Row:
    """One item: an image with one of its captions, or with all."""

    image: Field | None
    """The entry of the image, or its name; None where the table has none for the captions."""
    captions: tuple[Field, ...]
    place: str
    """Path of the entry that the item was made from."""
    problem: FieldError | None = None
    """Why the entry is none; it becomes a broken item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTables:
    """A question for a description, answered by a caption; or a picture to be drawn after one."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the table's folder (above `annotations`)."""
    split: str | None = None
    """Of a data set file, the split to take (`train`, `val`, `test`); None takes all."""
    one_per_image: bool = False
    """One document an image, with all captions in `meta`; otherwise one a caption."""
    is_drawn: bool = False
    """The caption is given and the image is the answer."""
    prompt: TaskPrompt = CAPTION

    def shards(self) -> list[Shard]:
        return [Shard(path, len(self._rows(path))) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        rows = self._rows(shard.name)
        for position in range(start, len(rows)):
            place = f"{shard.name}: {rows[position].place}"
            name = f"{stem_of(shard.name)}:{position}"
            yield position, attempt(place, partial(self._document, rows[position], name, store))

    def _rows(self, path: str) -> tuple[_Row, ...]:
        return _rows(fingerprint(path), self.split, self.one_per_image)

    def _document(self, row: _Row, name: str, store: ImageStore) -> Document:
        if row.problem is not None:
            raise row.problem
        if row.image is None:
            raise FieldError(row.place, "found no image with this image_id")
        captions = [caption.text().strip() for caption in row.captions]
        meta = {"captions": captions} if self.one_per_image else {}
        if self.is_drawn:
            image = first_image(store, _names(row.image), row.image.path)
            if not captions:
                raise FieldError(row.place, "found no caption to draw after")
            return Document(id=name, parts=(Text(captions[0]),), target=(image,), layout="I", meta=meta)
        image = first_image(store, _names(row.image), row.image.path, self.prompt.role)
        target = self.prompt.answer(captions[0]) if captions else ()
        return Document(id=name, parts=self.prompt.parts(image), target=target, layout="T", meta=meta)


def _names(image: Field) -> list[str]:
    """What the file of an image may be called."""
    if isinstance(image.value, str):
        return [image.text()]
    name = image["file_name" if "file_name" in image else "filename"].text()
    folder = image.get("filepath")
    return [name] if folder is None else [f"{folder.text()}/{name}", name]


@lru_cache(maxsize=REMEMBERED_TABLES)
def _rows(key: tuple[str, int, int], split: str | None, one_per_image: bool) -> tuple[_Row, ...]:
    path = key[0]
    table = read_table(path)
    try:
        if isinstance(table.value, list):
            rows = _listed_rows(table)
        elif "annotations" in table:
            rows = _coco_rows(table)
        else:
            rows = _split_rows(table, split)
    except FieldError as error:
        raise error.at(path) from error
    if split is not None and not rows:
        raise InputError(f"{path}: found no image of the split {split!r}")
    if one_per_image:
        return tuple(rows)
    return tuple(single for row in rows for single in _singles(row))


def _singles(row: _Row) -> list[_Row]:
    """A row for each caption; a broken one stays."""
    if row.problem is not None:
        return [row]
    return [_Row(row.image, (caption,), caption.path) for caption in row.captions]


def _coco_rows(table: Field) -> list[_Row]:
    """One row an image, in the order of the images; what belongs to no image at the end."""
    captions: dict[str, list[Field]] = {}
    rows, lost = [], []
    for annotation in table["annotations"].list():
        try:
            captions.setdefault(_key(annotation["image_id"]), []).append(annotation["caption"])
        except FieldError as error:
            lost.append(_Row(None, (), annotation.path, error))
    for image in table["images"].list():
        try:
            rows.append(_Row(image, tuple(captions.pop(_key(image["id"]), ())), image.path))
        except FieldError as error:
            lost.append(_Row(None, (), image.path, error))
    return rows + lost + [_Row(None, tuple(found), found[0].path) for found in captions.values()]


def _key(field: Field) -> str:
    """An identity; numbers and strings of digits are the same."""
    return str(field.value) if isinstance(field.value, int | str) else field.wrong("a number or a string")


def _listed_rows(table: Field) -> list[_Row]:
    rows = []
    for record in table.list():
        try:
            caption = record["caption"]
            captions = caption.list() if isinstance(caption.value, list) else [caption]
            rows.append(_Row(record["image"], tuple(captions), record.path))
        except FieldError as error:
            rows.append(_Row(None, (), record.path, error))
    return rows


def _split_rows(table: Field, split: str | None) -> list[_Row]:
    # COCO's `restval` belongs to training, as everybody uses it.
    wanted = {split, "restval"} if split == "train" else {split}
    rows = []
    for image in table["images"].list():
        try:
            if split is None or image["split"].text() in wanted:
                captions = tuple(sentence["raw"] for sentence in image["sentences"].list())
                rows.append(_Row(image, captions, image.path))
        except FieldError as error:
            rows.append(_Row(None, (), image.path, error))
    return rows
