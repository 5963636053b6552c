"""Captions to be drawn, as the published evaluation takes them: MS-COCO's and localised narratives.

MS-COCO (`captions_val2014.json`): the first caption of each image in lower case, of the first 30,000 images.
LN-COCO (arXiv 1912.03098; `coco_val_captions.jsonl`, lines of `{"image_id", "caption"}` about the images of
val2017): each narrative as it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm_interleaved.data.storage.image_stores import first_image, image_store
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.evaluation.task import TaskOptions
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    each_once,
    gold_documents,
    json_lines,
    refuse_doubled_ids,
)
from mm_interleaved.seeded_random import SeededRandom

NUM_DRAWN = 30_000
"""How many images the published FID is of."""
COCO_FILES, NARRATIVE_FILES = ("captions_val2014.json",), ("coco_val_captions.jsonl",)


def read_coco(options: TaskOptions, data: Path) -> list[Document]:
    """A document an image: its first caption in lower case."""
    path = annotation_file(data, COCO_FILES)
    refuse_doubled_ids(path, "images", "annotations")
    settings = {"paths": str(path), "is_drawn": True, "one_per_image": True}
    documents = gold_documents("captions", settings | options.source)
    return [_in_lower_case(document) for document in documents[:NUM_DRAWN]]


def read_narratives(options: TaskOptions, data: Path) -> list[Document]:
    """A document a narrative; for the released evaluation, some of them again, until there are 30,000.

    Which ones is drawn anew in each process there; here by a seed, so that everybody draws the same.
    """
    path = annotation_file(data, NARRATIVE_FILES)
    store = image_store(options.source.get("images"), str(path), skip_missing=True)
    documents = each_once(path, [_narrative(store, record) for record in json_lines(path)])
    return over_sampled(documents, NUM_DRAWN) if options.compat == "released" else documents


def over_sampled(documents: Sequence[Document], count: int) -> list[Document]:
    """The documents, and as many of them drawn once more as `count` asks for; each with an id of its own."""
    rng = SeededRandom(0)
    again = (documents[rng.below(len(documents))] for _ in range(count - len(documents)))
    extra = [replace(document, id=f"{document.id}:again-{number}") for number, document in enumerate(again)]
    return [*documents, *extra]


def _in_lower_case(document: Document) -> Document:
    parts = tuple(
        replace(part, text=part.text.lower()) if isinstance(part, Text) else part for part in document.parts
    )
    return replace(document, parts=parts)


def _narrative(store: ImageStore, line: Record) -> Document:
    try:
        record = line.field
        number, caption = record["image_id"], record["caption"].text().strip()
        if not isinstance(number.value, int | str) or not str(number.value).isdigit():
            number.wrong("a number, COCO's of the image")
        if not caption:
            record["caption"].wrong("a narrative")
        name = f"{int(number.value):012}.jpg"
        image = first_image(store, [name, f"val2017/{name}"], number.path)
    except FieldError as error:
        raise error.at(line.place) from error
    return Document(id=f"lncoco:{line.number}", parts=(Text(caption),), target=(image,), layout="I")
