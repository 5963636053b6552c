"""MMC4: web pages as lists of sentences, each image matched with one of them.

Of each page the images are kept that are similar enough to their sentence, at most a few of them by chance;
the sentences between two images are joined. Files: `docs_shard_*_v2.jsonl` or `.jsonl.zip`, the images by
name in one folder, at one address, or in tars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from mm_interleaved.data.source import (
    FilteredItem,
    Item,
    ItemRandom,
    Shard,
)
from mm_interleaved.data.storage.files import stem_of
from mm_interleaved.data.storage.image_stores import found_with_images, image_store
from mm_interleaved.data.storage.records import read_items
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import UsageError
from mm_interleaved.typed_settings import NUMBER, SEED, SHARE, check


@dataclass(frozen=True, slots=True, kw_only=True)
class MMC4:
    """Pages of MMC4; the defaults are those of the released model's training."""

    paths: str | tuple[str, ...]
    images: str | None = None
    """Folder, address or tars of the images; by default the folder of each file."""
    min_similarity: float = 0.24
    """Images whose `matched_sim` is below are left out."""
    max_images: int = 6
    """Of more images than this, as many are taken by chance."""
    single_image_share: Annotated[float, SHARE] = 0.5
    """This share (0 to 1) of the pages with exactly one image is kept."""
    image_first_share: Annotated[float, SHARE] = 0.5
    """An image stands before its sentence in this share of cases, after it in the others."""
    seed: Annotated[int, SEED] = 0
    epoch: Annotated[int, NUMBER] = 0

    def __post_init__(self):
        check(self)
        if self.max_images < 1:
            raise UsageError(f"max_images: found {self.max_images}, expected at least 1", field="max_images")

    def shards(self) -> list[Shard]:
        return [Shard(path) for path in found_with_images(self.paths, self.images)]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        store = image_store(self.images, shard.name, skip_missing=True)
        build = partial(self._document, shard.name, store)
        yield from read_items(shard.name, start, build, known=("raw_url", "image_url", "url"))

    def _document(
        self, path: str, store: ImageStore, record: Record, position: int
    ) -> Document | FilteredItem:
        page, rng = record.field, ItemRandom(self.seed, self.epoch, path, position)
        sentences = [sentence.text() for sentence in page["text_list"].list()]
        matched = self._matched(page, len(sentences))
        if not matched:
            return FilteredItem(record.place, "no_similar_image")
        # Drawn whatever is there, so that the later choices do not depend on earlier ones.
        keeps_single = rng.happens(self.single_image_share)
        images, missing = self._images(matched, store, rng)
        if not images:
            return FilteredItem(record.place, "missing_images")
        if len(images) == 1 and not keeps_single:
            return FilteredItem(record.place, "single_image")
        # The images of one sentence stand on one side of it, in their order.
        sides = {sentence: rng.happens(self.image_first_share) for _, sentence, _ in images}
        placed = [(sentence, sides[sentence], image) for _, sentence, image in images]
        given = page.get("id")
        return Document(
            id=f"{stem_of(path)}:{position}" if given is None else given.text(),
            parts=_between(sentences, placed),
            meta={"missing_images": missing} if missing else {},
        )

    def _matched(self, record: Field, num_sentences: int) -> list[tuple[int, int, Field]]:
        """Number, sentence and name of each image that is similar enough; everything is checked."""
        infos = record["image_info"].list()
        _check_matrix(record.get("similarity_matrix"), len(infos), num_sentences)
        matched = []
        for number, info in enumerate(infos):
            sentence = info["matched_text_index"].integer(0, num_sentences - 1)
            # Asked for also where it is not taken, or it would count as lost.
            name, similarity = info["image_name"], info["matched_sim"].value
            if isinstance(similarity, bool) or not isinstance(similarity, int | float):
                info["matched_sim"].wrong("a number")
            if similarity >= self.min_similarity:
                matched.append((number, sentence, name))
        return matched

    def _images(
        self, matched: Sequence[tuple[int, int, Field]], store: ImageStore, rng: ItemRandom
    ) -> tuple[list[tuple[int, int, Image]], int]:
        """At most `max_images` of the images that are there, in the page's order, and how many were missing.

        No more are fetched than are taken.
        """
        found: list[tuple[int, int, Image]] = []
        missing = 0
        for index in rng.order(len(matched)):
            number, sentence, name = matched[index]
            if len(found) == self.max_images:
                break
            image = store.image(name)
            if image is None:
                missing += 1
            else:
                found.append((number, sentence, image))
        return sorted(found, key=lambda item: item[0]), missing


def _check_matrix(matrix: Field | None, num_images: int, num_sentences: int):
    if matrix is None:
        return
    rows = matrix.list()
    widths = {len(row.list()) for row in rows}
    if len(rows) != num_images or widths - {num_sentences}:
        raise FieldError(
            matrix.path,
            f"found {len(rows)} x {sorted(widths)}, expected {num_images} images x {num_sentences} texts",
        )


def _between(sentences: Sequence[str], placed: Sequence[tuple[int, bool, Image]]) -> tuple[Part, ...]:
    """Sentences joined by a space, with each image before or after its sentence, in the images' order."""
    parts: list[Part] = []
    run: list[str] = []

    def end_run():
        text = " ".join(words for sentence in run if (words := sentence.strip()))
        if text:
            parts.append(Text(text))
        run.clear()

    def add(sentence: int, is_first: bool):
        for place, side, image in placed:
            if place == sentence and side == is_first:
                end_run()
                parts.append(image)

    for number, sentence in enumerate(sentences):
        add(number, is_first=True)
        run.append(sentence)
        add(number, is_first=False)
    end_run()
    return tuple(parts)
