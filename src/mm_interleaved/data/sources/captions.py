"""Captions of COCO, Flickr30k and NoCaps: tables of images and captions.

Read are COCO's own form (`{"images", "annotations"}`), Karpathy's lists of image and caption
(`coco_karpathy_*.json`), and Karpathy's data set files (`{"images": [{"filename", "sentences", "split"}]}`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated

from mm_interleaved.data.source import FilteredItem, Item, Shard, attempt
from mm_interleaved.data.storage.files import fingerprint, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import REMEMBERED_TABLES, read_table
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError
from mm_interleaved.tokens.task_prompts import CAPTION, PROMPTS, TaskPrompt
from mm_interleaved.typed_settings import Named


@dataclass(frozen=True, slots=True)
class _Row:
    """One item: an image with one of its captions, or with all."""

    place: str
    """Path of the entry that the item was made from."""
    image: Field | None = None
    """The entry of the image; None where the table has none for the captions."""
    annotations: tuple[Field, ...] = ()
    """Entries of its captions, where they do not stand in the entry of the image."""
    chosen: int | None = None
    """Of the captions in the image's own entry, the one to take; None takes all."""
    lacks_caption: bool = False
    """It has none, although others of its table do."""
    problem: FieldError | None = None
    """Why the entry is none; it becomes a broken item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTables:
    """A question for a description, answered by a caption; or an image to be generated from one."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the table's folder (above `annotations`)."""
    split: str | None = None
    """Of a data set file, the split to take (`train`, `val`, `test`); None takes all."""
    one_per_image: bool = False
    """One document an image, with all captions in `meta`; otherwise one a caption."""
    is_drawn: bool = False
    """The caption is given and the image is the answer."""
    prompt: Annotated[TaskPrompt, Named(PROMPTS)] = CAPTION

    def shards(self) -> list[Shard]:
        return [Shard(path, len(self._rows(path))) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        rows = self._rows(shard.name)
        for position, row in enumerate(rows[start:], start):
            build = partial(self._document, row, f"{stem_of(shard.name)}:{position}", store)
            records = row.annotations if row.image is None else (row.image, *row.annotations)
            yield position, attempt(f"{shard.name}: {row.place}", build, *records, known=_IDENTITIES)

    def _rows(self, path: str) -> tuple[_Row, ...]:
        return _rows(fingerprint(path), self.split, self.one_per_image)

    def _document(self, row: _Row, name: str, store: ImageStore, *records: Field) -> Document | FilteredItem:
        if row.problem is not None:
            raise row.problem
        if row.image is None:
            raise FieldError(row.place, "found no image with this image_id")
        if row.lacks_caption:
            return FilteredItem(row.place, "no_caption")
        entry, *annotations = records
        captions = _own_captions(entry) + [one["caption"].text().strip() for one in annotations]
        captions = captions if row.chosen is None else [captions[row.chosen]]
        meta = {"captions": captions} if self.one_per_image else {}
        if self.is_drawn:
            image = first_image(store, _names(entry), entry.path)
            if not captions:
                raise FieldError(row.place, "found no caption to draw after")
            return Document(id=name, parts=(Text(captions[0]),), target=(image,), layout="I", meta=meta)
        image = first_image(store, _names(entry), entry.path, self.prompt.role)
        # Of all captions of an image, a blank one among them is no answer.
        answer = next(filter(None, captions), captions[0] if captions else None)
        target = () if answer is None else self.prompt.answer(answer)
        return Document(id=name, parts=self.prompt.parts(image), target=target, layout="T", meta=meta)


_IDENTITIES = ("id", "image_id", "split", "imgid", "sentid", "sentids", "cocoid", "tokens")


def _own_captions(entry: Field) -> list[str]:
    """The captions in the entry of an image: Karpathy's forms; none in COCO's."""
    if "sentences" in entry:
        return [sentence["raw"].text().strip() for sentence in entry["sentences"].list()]
    if "image" not in entry or "caption" not in entry:
        return []
    return [caption.text().strip() for caption in _listed(entry["caption"])]


def _listed(caption: Field) -> list[Field]:
    return caption.list() if isinstance(caption.value, list) else [caption]


def _names(entry: Field) -> list[str]:
    """What the file of an image may be called."""
    if "image" in entry:
        return [entry["image"].text()]
    name = entry["file_name" if "file_name" in entry else "filename"].text()
    folder = entry.get("filepath")
    return [name] if folder is None else [f"{folder.text()}/{name}", name]


@lru_cache(maxsize=REMEMBERED_TABLES)
def _rows(key: tuple[str, int, int], split: str | None, one_per_image: bool) -> tuple[_Row, ...]:
    path = key[0]
    table = read_table(path, "images", "annotations")
    try:
        if isinstance(table.value, list):
            rows = _listed_rows(table, one_per_image)
        elif "annotations" in table:
            rows = _coco_rows(table, one_per_image)
        elif split is not None or any("sentences" in image for image in table["images"].list()):
            rows = _split_rows(table, split, one_per_image)
        else:
            # A test split, whose captions nobody publishes.
            rows = [_Row(image.path, image) for image in table["images"].list()]
    except FieldError as error:
        raise error.at(path) from error
    if split is not None and not rows:
        raise InputError(f"{path}: found no image of the split {split!r}")
    return tuple(rows)


def _coco_rows(table: Field, one_per_image: bool) -> list[_Row]:
    """The captions in the order of their images; what belongs to no image at the end."""
    captions: dict[str, list[Field]] = {}
    rows: list[_Row] = []
    lost: list[_Row] = []
    for annotation in table["annotations"].list():
        try:
            captions.setdefault(_key(annotation["image_id"]), []).append(annotation)
        except FieldError as error:
            lost.append(_Row(annotation.path, problem=error))
    for image in table["images"].list():
        try:
            found = captions.pop(_key(image["id"]), [])
        except FieldError as error:
            lost.append(_Row(image.path, problem=error))
            continue
        if one_per_image:
            rows.append(_Row(image.path, image, tuple(found)))
        elif found:
            rows += [_Row(annotation.path, image, (annotation,)) for annotation in found]
        else:
            rows.append(_Row(image.path, image, lacks_caption=True))
    rest = [annotation for found in captions.values() for annotation in found]
    return rows + lost + [_Row(f"{one.path}.image_id", None, (one,)) for one in rest]


def _key(field: Field) -> str:
    """An identity; numbers and strings of digits are the same."""
    return str(field.value) if isinstance(field.value, int | str) else field.wrong("a number or a string")


def _own_rows(entry: Field, captions: Sequence[Field], one_per_image: bool) -> list[_Row]:
    """The rows of an image that lists its captions itself."""
    if one_per_image:
        return [_Row(entry.path, entry)]
    rows = [_Row(caption.path, entry, chosen=number) for number, caption in enumerate(captions)]
    return rows or [_Row(entry.path, entry, lacks_caption=True)]


def _listed_rows(table: Field, one_per_image: bool) -> list[_Row]:
    rows: list[_Row] = []
    if not any("caption" in record for record in table.list()):
        return [_Row(record.path, record) for record in table.list()]
    for record in table.list():
        try:
            assert record["image"], "missing in some entries of a list: reported of each"
            rows += _own_rows(record, _listed(record["caption"]), one_per_image)
        except FieldError as error:
            rows.append(_Row(record.path, problem=error))
    return rows


def _split_rows(table: Field, split: str | None, one_per_image: bool) -> list[_Row]:
    # COCO's `restval` belongs to training, as everybody uses it.
    wanted = {split, "restval"} if split == "train" else {split}
    rows: list[_Row] = []
    for image in table["images"].list():
        try:
            if split is None or image["split"].text() in wanted:
                rows += _own_rows(image, image["sentences"].list(), one_per_image)
        except FieldError as error:
            rows.append(_Row(image.path, problem=error))
    return rows
