"""RefCOCO, RefCOCO+, RefCOCOg: a phrase, an image, and the box of what the phrase means.

Read are lines of `{"image", "sent", "bbox": [x1, y1, x2, y2]}` (pixels, `width` and `height` of the image
beside them) and COCO-like tables whose images carry a `caption` and whose boxes are `[x, y, width, height]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from mm_interleaved.data.prompts import GROUND, TaskPrompt, box_answer, phrase
from mm_interleaved.data.sources.files import stem_of
from mm_interleaved.data.sources.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.sources.records import read_items, read_table
from mm_interleaved.data.sources.source import FilteredItem, Item, Shard, attempt
from mm_interleaved.document import Document, Image
from mm_interleaved.image_references import ImageStore
from mm_interleaved.strict_json import Field, FieldError, Record

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringExpressions:
    """The question where something is, answered by its box in thousandths of the image."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the file's folder (above `annotations`)."""
    split: str | None = None
    """Of lines that have a `split`, the one to take (`train`, `val`, `testA`, ...); None takes all."""
    prompt: TaskPrompt = GROUND

    def shards(self) -> list[Shard]:
        return [
            Shard(path, None if _is_lines(path) else len(_table_records(path)))
            for path in found_with_images(self.paths, self.images)
        ]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        store = image_store(self.images, path, skip_missing=True)
        if _is_lines(path):
            yield from read_items(path, start, partial(self._from_line, path, store))
            return
        images = _table_images(path)
        for position, annotation in enumerate(_table_records(path)[start:], start):
            image = images.get(str(annotation["image_id"].value)) if "image_id" in annotation else None
            build = partial(self._from_table, annotation, image, f"{stem_of(path)}:{position}", store)
            yield position, attempt(f"{path}: {annotation.path}", build)

    def _from_line(
        self, path: str, store: ImageStore, line: Record, position: int
    ) -> Document | FilteredItem:
        record, name = line.field, f"{stem_of(path)}:{position}"
        if self.split is not None and record["split"].text() != self.split:
            return FilteredItem(line.place, "other_split")
        reference, sentence = record["image"], record["sent"].text()
        image = first_image(store, [reference.text()], reference.path, self.prompt.role)
        left, top, right, bottom = box_of(record["bbox"])
        return self._document(image, sentence, (left, top, right, bottom), record, record["bbox"], name)

    def _from_table(self, annotation: Field, image: Field | None, name: str, store: ImageStore) -> Document:
        if image is None:
            raise FieldError(f"{annotation.path}.image_id", "found no image with this id")
        reference = image["file_name"]
        names = [reference.text(), reference.text().replace("COCO_train2014_", "")]
        picture = first_image(store, names, reference.path, self.prompt.role)
        left, top, width, height = box_of(annotation["bbox"])
        box = (left, top, left + width, top + height)
        return self._document(picture, image["caption"].text(), box, image, annotation["bbox"], name)

    def _document(
        self, image: Image, sentence: str, box: Box, sized: Field, field: Field, name: str
    ) -> Document:
        width, height = image_size(image, sized)
        return Document(
            id=name,
            parts=self.prompt.parts(image, phrase(sentence, self.prompt)),
            target=self.prompt.answer(box_answer(checked_box(box, width, height, field), width, height)),
            layout="T",
            meta={"phrase": sentence, "box": list(box), "image_size": [width, height]},
        )


def box_of(field: Field) -> Box:
    """Four finite numbers."""
    values = [item.value for item in field.list()]
    is_box = len(values) == 4 and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
    if not is_box:
        field.wrong("four numbers")
    first, second, third, fourth = values
    return first, second, third, fourth


def checked_box(box: Box, width: float, height: float, field: Field) -> Box:
    """The box, where it has an area and touches the image."""
    left, top, right, bottom = box
    if not (left < right and top < bottom and right > 0 and bottom > 0 and left < width and top < height):
        raise FieldError(
            field.path, f"found the box {list(box)}, expected left < right and top < bottom in the image"
        )
    return box


def image_size(image: Image, record: Field) -> tuple[int, int]:
    """Width and height in pixels, out of the record, or of the image itself, which is then opened."""
    if record.get("width") is not None and record.get("height") is not None:
        return record["width"].integer(1, 10**6), record["height"].integer(1, 10**6)
    width, height = image.load().size
    return width, height


def _is_lines(path: str) -> bool:
    return not path.lower().endswith(".json")


def _table_images(path: str) -> Mapping[str, Field]:
    """Entries of images by id; one without an id is missed where its box is."""
    images = read_table(path)["images"].list()
    return {str(image["id"].value): image for image in images if "id" in image}


def _table_records(path: str) -> list[Field]:
    try:
        table = read_table(path)
        table["images"].list()
        return table["annotations"].list()
    except FieldError as error:
        raise error.at(path) from error
