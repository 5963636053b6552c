"""Flickr30k Entities: `Sentences/<id>.txt` with marked phrases, `Annotations/<id>.xml` with their boxes.

A shard is a list of image ids (`train.txt`, `val.txt`, `test.txt`) beside the two folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated
from xml.etree import ElementTree

from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, Shard, attempt
from mm_interleaved.data.storage.files import file_exists, folder_of, open_file, reading
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.manifests import check_against_manifest
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.errors import InputError, escape
from mm_interleaved.tokens.boxes import Edges, box_in_image, size_of_image
from mm_interleaved.tokens.task_prompts import GROUND, PROMPTS, TaskPrompt, phrase
from mm_interleaved.typed_settings import Named

_PHRASE = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Phrase:
    words: str
    entity: str
    sentence: str
    """The whole sentence, without marks."""
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flickr30kEntities:
    """One document a marked phrase: where is it; the target has its boxes, one after the other."""

    paths: str | tuple[str, ...]
    """Lists of image ids."""
    images: str | None = None
    """Folder, address or tars of the images; by default `flickr30k-images` (or `images`) beside the list."""
    prompt: Annotated[TaskPrompt, Named(PROMPTS)] = GROUND

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        folder = folder_of(shard.name)
        store = image_store(self.images or folder, shard.name, skip_missing=True)
        position = -1
        for image_id in _text(shard.name).split():
            sentences = f"{folder}/Sentences/{image_id}.txt"
            try:
                phrases = _phrases(sentences)
            except InputError as error:
                phrases = [str(error).removeprefix(f"{sentences}: ")]
            annotations: _Annotations | None = None
            for found in phrases:
                position += 1
                if position < start:
                    continue
                if isinstance(found, str):
                    yield position, BrokenItem(sentences, found)
                    continue
                if annotations is None:
                    annotations = _Annotations(f"{folder}/Annotations/{image_id}.xml")
                name = f"{image_id}:{position}"
                build = partial(self._item, found, image_id, annotations, name, store)
                yield position, attempt(found.place, build)

    def _item(
        self, found: _Phrase, image_id: str, annotations: _Annotations, name: str, store: ImageStore
    ) -> Document | FilteredItem:
        width, height, boxes = annotations.read()
        if found.entity not in boxes:
            return FilteredItem(found.place, "no_box")
        names = [f"{image_id}.jpg", f"flickr30k-images/{image_id}.jpg"]
        image = first_image(store, names, "image_id", self.prompt.role)
        field = Field(None, f"EN#{found.entity}")
        size = size_of_image(image, (width, height), "size")
        answers = [box_in_image(edges, size, field).answer() for edges in boxes[found.entity]]
        return Document(
            id=name,
            parts=self.prompt.parts(image, phrase(found.words, self.prompt)),
            target=self.prompt.answer(" ".join(answers)),
            layout="T",
            meta={
                "phrase": found.words,
                "sentence": found.sentence,
                "boxes": [list(box) for box in boxes[found.entity]],
                "image_size": [width, height],
            },
        )


class _Annotations:
    """The boxes of one image, read when the first of its phrases needs them."""

    def __init__(self, path: str):
        self.path = path
        self._found: tuple[int, int, Mapping[str, list[Edges]]] | None = None

    def read(self) -> tuple[int, int, Mapping[str, list[Edges]]]:
        """Width, height, and boxes by entity. Raises InputError."""
        if self._found is None:
            self._found = _boxes(self.path)
        return self._found


def _phrases(path: str) -> list[_Phrase | str]:
    """The marked phrases of all sentences of an image; something that can be seen, no `notvisual`."""
    phrases: list[_Phrase | str] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        sentence = _PHRASE.sub(lambda match: match[3], line).strip()
        phrases += [
            _Phrase(words, entity, sentence, f"{path}:{number}")
            for entity, kind, words in _PHRASE.findall(line)
            if kind != "notvisual"
        ]
    return phrases


def _boxes(path: str) -> tuple[int, int, Mapping[str, list[Edges]]]:
    text = _text(path)
    if "<!" in text.replace("<!--", ""):
        # Entities of XML can blow up a few lines to gigabytes; these files have none.
        raise InputError(f"{path}: found a declaration, expected elements only")
    try:
        root = ElementTree.fromstring(text)
        width, height = (int(root.findtext(f"size/{name}", "")) for name in ("width", "height"))
        if min(width, height) < 1:
            raise ValueError(f"a size of {width} x {height}")
        boxes: dict[str, list[Edges]] = {}
        for item in root.iter("object"):
            box = item.find("bndbox")
            if box is None:
                continue
            left, top, right, bottom = (
                float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            for entity in item.iter("name"):
                boxes.setdefault(entity.text or "", []).append((left, top, right, bottom))
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: not the annotation of an image ({escape(str(error))})") from error
    return width, height, boxes


def _text(path: str) -> str:
    check_against_manifest(path)
    if not file_exists(path):
        raise InputError(f"{path}: there is no such file")
    with open_file(path) as file, reading(path):
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path}: more than {_MAX_BYTES} bytes, expected a small file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8") from error
