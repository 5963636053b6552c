"""CoMM: what a model is given and what it should answer, texts with images at their placeholders."""

from __future__ import annotations

from mm_interleaved.documents.document import Part, Text
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.placeholders import filled, images_first, with_slots
from mm_interleaved.documents.record_parts import Body, named_images
from mm_interleaved.documents.strict_json import Field


def read_comm(record: Field, folder: ImageStore) -> Body:
    """`model_input` with its images; `model_output` with its own is the target."""
    asked = _with_images(record["model_input"], record.get("input_image_list"), folder)
    answer, images = record.get("model_output"), record.get("output_gt_image_list")
    return Body(asked, target=[] if answer is None else _with_images(answer, images, folder))


def _with_images(text: Field, references: Field | None, folder: ImageStore) -> list[Part]:
    """A text with images at its placeholders, or before it where they do not match."""
    images, pieces = named_images(references, folder), [Text(text.text())]
    placed = with_slots(pieces, len(images))
    return images_first(pieces, images) if placed is None else filled(placed, images)
