"""Image paragraphs: `{"annotations": [{"image_id", "caption", "url"}]}`, or a list with `paragraph`.

The image lies where the last two parts of its address say: `VG_100K/2.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from mm_interleaved.data.source import FilteredItem, Item, Shard, attempt
from mm_interleaved.data.storage.files import found_files, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import read_table
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.tokens.task_prompts import PARAGRAPH, PROMPTS, TaskPrompt
from mm_interleaved.typed_settings import Named


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraphs:
    """A question for a description, answered by a paragraph."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the table's folder (above `annotations`)."""
    split_path: str | None = None
    """A JSON list of the image ids to take, such as `train_split.json`; None takes all."""
    prompt: Annotated[TaskPrompt, Named(PROMPTS)] = PARAGRAPH

    def shards(self) -> list[Shard]:
        self._wanted()
        return [Shard(path, len(_records(path))) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        wanted = self._wanted()
        for position, record in enumerate(_records(shard.name)[start:], start):
            place = f"{shard.name}: {record.path}"
            name = f"{stem_of(shard.name)}:{position}"
            build = partial(self._item, place, name, store, wanted)
            yield position, attempt(place, build, record)

    def _wanted(self) -> frozenset[str] | None:
        """The ids of the split; None for all."""
        return None if self.split_path is None else _ids(found_files(self.split_path)[0])

    def _item(
        self, place: str, name: str, store: ImageStore, wanted: frozenset[str] | None, record: Field
    ) -> Document | FilteredItem:
        image_id = str(record["image_id"].value)
        if wanted is not None and image_id not in wanted:
            return FilteredItem(place, "other_split")
        text = record["paragraph" if "paragraph" in record else "caption"].text().strip()
        address = record.get("url")
        pieces = [] if address is None else address.text().split("/")
        names = ["/".join(pieces[-2:]), pieces[-1]] if pieces else []
        image = first_image(store, [*names, f"{image_id}.jpg"], f"{record.path}.url", self.prompt.role)
        return Document(id=name, parts=self.prompt.parts(image), target=self.prompt.answer(text), layout="T")


def _records(path: str) -> list[Field]:
    table = read_table(path, "annotations", "images")
    try:
        return table.list() if isinstance(table.value, list) else table["annotations"].list()
    except FieldError as error:
        raise error.at(path) from error


def _ids(path: str) -> frozenset[str]:
    table = read_table(path)
    try:
        return frozenset(str(item.value) for item in table.list())
    except FieldError as error:
        raise error.at(path) from error
