"""What a prediction says: the text, the images, and the ranking that a metric takes."""

from __future__ import annotations

from collections.abc import Sequence

from mm_interleaved.documents.document import Document, Image, Part, Text, answer_parts


def parts_of(prediction: Document | None) -> tuple[Part, ...]:
    """See `answer_parts`; nothing without a prediction."""
    return () if prediction is None else answer_parts(prediction)


def answer_text(prediction: Document | None) -> str:
    """The texts of the answer, joined by a space; empty where there is none."""
    texts = [part.text.strip() for part in parts_of(prediction) if isinstance(part, Text)]
    return " ".join(text for text in texts if text)


def answer_images(prediction: Document | None) -> list[Image]:
    """The images of the answer."""
    return [part for part in parts_of(prediction) if isinstance(part, Image)]


def answer_ranking(prediction: Document | None) -> list[int]:
    """Indices of the candidates from the likeliest; empty where they were not ranked."""
    return [] if prediction is None else list(prediction.meta.get("ranking") or ())


def by_gold(predictions: Sequence[Document], gold: Sequence[Document]) -> list[Document | None]:
    """The prediction of each gold document; None where it failed."""
    found = {prediction.id: prediction for prediction in predictions}
    return [found.get(document.id) for document in gold]
