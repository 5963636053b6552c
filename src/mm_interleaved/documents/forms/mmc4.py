"""MMC4: a web page's sentences, and images that are matched with them."""

from __future__ import annotations

from mm_interleaved.documents.forms.sentences import PlacedImage, sentences_with_images
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.record_parts import Body
from mm_interleaved.documents.strict_json import Field, FieldError


def read_mmc4(record: Field, folder: ImageStore) -> Body:
    """Each image before the sentence it is matched with."""
    sentences = [sentence.text() for sentence in record["text_list"].list()]
    infos = record["image_info"].list()
    matrix = record.get("similarity_matrix")
    if matrix is not None:
        widths = {len(row.list()) for row in matrix.list()}
        if len(matrix.list()) != len(infos) or widths - {len(sentences)}:
            shape = f"{len(matrix.list())} x {sorted(widths)}"
            raise FieldError(
                matrix.path, f"found {shape}, expected {len(infos)} images x {len(sentences)} texts"
            )
    placed = []
    for info in infos:
        place = info["matched_text_index"].integer(0, len(sentences) - 1)
        image = folder.image(info["image_name"])
        if image is not None:
            placed.append(PlacedImage(place, True, image))
    return Body(sentences_with_images(sentences, placed))
