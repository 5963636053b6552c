"""RefCOCO, RefCOCO+, RefCOCOg: a phrase, an image, and the box of what the phrase means.

Read are lines of `{"image", "sent", "bbox": [x1, y1, x2, y2]}` (pixels, `width` and `height` of the image
beside them) and COCO-like tables whose images carry a `caption` and whose boxes are `[x, y, width, height]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from mm_interleaved.data.source import FilteredItem, Item, Shard, attempt
from mm_interleaved.data.storage.files import name_of, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import read_items, read_table
from mm_interleaved.documents.document import Document, Image
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.tokens.boxes import Edges, box_in_image, four_numbers, size_of_image
from mm_interleaved.tokens.task_prompts import GROUND, PROMPTS, TaskPrompt, phrase
from mm_interleaved.typed_settings import Named

_KNOWN = ("id", "image_id", "split", "tokens_positive", "segmentation", "original_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringExpressions:
    """The question where something is, answered by its box in thousandths of the image."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the file's folder (above `annotations`)."""
    split: str | None = None
    """Of lines that have a `split`, the one to take (`train`, `val`, `testA`, ...); None takes all."""
    prompt: Annotated[TaskPrompt, Named(PROMPTS)] = GROUND

    def shards(self) -> list[Shard]:
        return [
            Shard(path, None if _is_lines(path) else len(_table_records(path)))
            for path in found_with_images(self.paths, self.images)
        ]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        store = image_store(self.images, path, skip_missing=True)
        if _is_lines(path):
            yield from read_items(path, start, partial(self._from_line, path, store), known=_KNOWN)
            return
        images = _table_images(path)
        for position, annotation in enumerate(_table_records(path)[start:], start):
            image = images.get(str(annotation["image_id"].value)) if "image_id" in annotation else None
            build = partial(self._from_table, f"{stem_of(path)}:{position}", store)
            records = (annotation,) if image is None else (annotation, image)
            yield position, attempt(f"{path}: {annotation.path}", build, *records, known=_KNOWN)

    def _from_line(
        self, path: str, store: ImageStore, line: Record, position: int
    ) -> Document | FilteredItem:
        record, name = line.field, f"{stem_of(path)}:{position}"
        if self.split is not None and record["split"].text() != self.split:
            return FilteredItem(line.place, "other_split")
        reference, sentence = record["image"], record["sent"].text()
        image = first_image(store, [reference.text()], reference.path, self.prompt.role)
        edges = four_numbers(record["bbox"])
        return self._document(image, sentence, edges, record, record["bbox"], name)

    def _from_table(
        self, name: str, store: ImageStore, annotation: Field, image: Field | None = None
    ) -> Document:
        if image is None:
            raise FieldError(f"{annotation.path}.image_id", "found no image with this id")
        reference = image["file_name"]
        names = [reference.text(), reference.text().replace("COCO_train2014_", "")]
        found = first_image(store, names, reference.path, self.prompt.role)
        left, top, width, height = four_numbers(annotation["bbox"])
        edges = (left, top, left + width, top + height)
        return self._document(found, image["caption"].text(), edges, image, annotation["bbox"], name)

    def _document(
        self, image: Image, sentence: str, edges: Edges, sized: Field, field: Field, name: str
    ) -> Document:
        size = size_of_image(image, _recorded_size(sized), f"{sized.path}.width".lstrip("."))
        box = box_in_image(edges, size, field)
        return Document(
            id=name,
            parts=self.prompt.parts(image, phrase(sentence, self.prompt)),
            target=self.prompt.answer(box.answer()),
            layout="T",
            meta={"phrase": sentence, "box": list(edges), "image_size": list(size)},
        )


def _recorded_size(record: Field) -> tuple[int, int] | None:
    """Width and height in pixels; None where the record does not state them."""
    width, height = record.get("width"), record.get("height")
    return width and height and (width.integer(1, 10**6), height.integer(1, 10**6))


def _is_lines(path: str) -> bool:
    return not name_of(path).lower().endswith((".json", ".json.gz"))


def _table_images(path: str) -> Mapping[str, Field]:
    """Entries of images by id; one without an id is missed where its box is."""
    images = read_table(path, "images", "annotations")["images"].list()
    return {str(image["id"].value): image for image in images if "id" in image}


def _table_records(path: str) -> list[Field]:
    try:
        table = read_table(path, "images", "annotations")
        table["images"].list()
        return table["annotations"].list()
    except FieldError as error:
        raise error.at(path) from error
