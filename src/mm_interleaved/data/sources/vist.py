"""VIST: stories of (mostly) five photographs.

Read are the formatted annotations (`{"annotations": {story: [{"sequence_index", "image_id", "caption"}]}}`,
also as a list of `{"story_id", "story"}`) and the original story-in-sequence files (`sis`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from mm_interleaved.data.source import Item, Shard, attempt
from mm_interleaved.data.sources.stories import story_document
from mm_interleaved.data.storage.files import fingerprint, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import REMEMBERED_TABLES, read_table
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field, FieldError

_KNOWN = ("original_text", "story_id", "album_id", "worker_id", "storylet_id", "image_order", "tier")
_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class _Story:
    name: str
    panels: Field
    """A list of panels, in the file's order."""
    path: str
    """What the story was made from."""
    problem: FieldError | None = None
    """Why that is no story."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualStories:
    """Stories; by default everything is given but the last image."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the file's folder (above `annotations`)."""
    num_given: int = -1
    """Parts (captions and images) that are given; negative: counted from the end; 0: all, no target."""

    def shards(self) -> list[Shard]:
        return [
            Shard(path, len(_stories(fingerprint(path))))
            for path in found_with_images(self.paths, self.images)
        ]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        for position, story in enumerate(_stories(fingerprint(shard.name))[start:], start):
            build = partial(self._document, story, f"{stem_of(shard.name)}:{story.name}", store)
            yield position, attempt(f"{shard.name}: {story.path}", build, story.panels, known=_KNOWN)

    def _document(self, story: _Story, name: str, store: ImageStore, panels: Field) -> Document:
        def order(panel: Field) -> int:
            key = "sequence_index" if "sequence_index" in panel else "worker_arranged_photo_order"
            value = panel[key]
            # The original files have the numbers as strings.
            return int(value.value) if str(value.value).isdecimal() else value.wrong("a number from 0")

        if story.problem is not None:
            raise story.problem
        orders = [order(panel) for panel in panels.list()]
        if len(set(orders)) < len(orders):
            raise FieldError(story.path, f"found the places {orders}, expected each once")
        captioned = [
            (
                panel["caption" if "caption" in panel else "text"].text().strip(),
                first_image(store, _names(panel), panel.path),
            )
            for panel in sorted(panels.list(), key=order)
        ]
        return story_document(name, captioned, self.num_given, story.path)


def _names(panel: Field) -> list[str]:
    image_id = panel["image_id" if "image_id" in panel else "photo_flickr_id"]
    return [f"{image_id.value}{suffix}" for suffix in _SUFFIXES]


@lru_cache(maxsize=REMEMBERED_TABLES)
def _stories(key: tuple[str, int, int]) -> tuple[_Story, ...]:
    path = key[0]
    try:
        annotations = read_table(path, "annotations", "images", "albums")["annotations"]
        if isinstance(annotations.value, dict):
            found = [(name, annotations[name]) for name in annotations.object()]
            return tuple(_Story(name, panels, panels.path) for name, panels in found)
        records = annotations.list()
    except FieldError as error:
        raise error.at(path) from error
    if any(isinstance(record.value, list) for record in records[:2]):
        return _original_stories(records)
    return tuple(map(_listed_story, records))


def _listed_story(record: Field) -> _Story:
    try:
        return _Story(str(record["story_id"].value), record["story"], record.path)
    except FieldError as error:
        return _Story("", record, record.path, error)


def _original_stories(records: list[Field]) -> tuple[_Story, ...]:
    """Lists of one panel each, the panels of a story anywhere in the file; what is no panel at the end."""
    panels: dict[str, list[Any]] = {}
    paths: dict[str, str] = {}
    lost = []
    for record in records:
        try:
            for panel in record.list():
                name = str(panel["story_id"].value)
                panels.setdefault(name, []).append(panel.value)
                paths.setdefault(name, panel.path)
        except FieldError as error:
            lost.append(_Story("", record, record.path, error))
    stories = (_Story(name, Field(found, paths[name]), paths[name]) for name, found in panels.items())
    return (*stories, *lost)
