"""The official input of interactive generation (`annt.json`)."""

from __future__ import annotations

import logging
from typing import Any

from mm_interleaved.documents.document import Image, Part
from mm_interleaved.documents.forms.sentences import PlacedImage, sentences_with_images
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_parts import Body, same_length
from mm_interleaved.documents.strict_json import Field

logger = logging.getLogger(__name__)


def read_annotation(record: Field, folder: ImageStore) -> Body:
    """The official input of interactive generation.

    `generate_images` asks for the last image: the file named there is a dummy, never opened.
    `generate_texts` asks for a text after everything. From there on texts and images take turns, `num_iter`
    in all.
    """
    sentences = [sentence.text() for sentence in record["sentences"].list()]
    places, sides = record["sentence_ixs"].list(), record["image_first"].list()
    references = record["images"].list()
    same_length(record, "sentence_ixs", "images")
    same_length(record, "image_first", "images")
    mode, rounds = record.get("generate_mode"), record.get("num_iter")
    if mode is not None and mode.text() not in ("generate_images", "generate_texts"):
        mode.wrong('"generate_images" or "generate_texts"')
    asks_for_image = mode is not None and mode.text() == "generate_images"
    if asks_for_image and not references:
        record["images"].wrong("a dummy at the end, in the place of the image to generate")
    placed = []
    for index, (reference, place, side) in enumerate(zip(references, places, sides, strict=True)):
        is_dummy = asks_for_image and index == len(references) - 1
        image = None if is_dummy else folder.image(reference)
        if image is not None or is_dummy:
            placed.append(PlacedImage(place.integer(0, len(sentences) - 1), side.boolean(), image))
    parts = sentences_with_images(sentences, placed)
    if mode is None:
        return Body(parts)
    number = 1 if rounds is None else rounds.integer(1, 1000)
    letters = "IT" if asks_for_image else "TI"
    layout = " ".join(letters[index % 2] for index in range(number))
    return Body(_before_dummy(parts, record) if asks_for_image else parts, layout=layout)


def _before_dummy(parts: list[Any], record: Field) -> list[Part]:
    """The parts before the one image that is None, with its place checked."""
    end = parts.index(None)
    if any(isinstance(part, Image) for part in parts[end:]):
        record["sentence_ixs"].wrong("the image to generate, the last one named, to come last")
    if len(parts) > end + 1:
        logger.warning(
            "%s: text after the image to generate cannot influence it: left out", record.path or "record"
        )
    return parts[:end]
