"""COCO-Karpathy, Flickr30k, NoCaps and image paragraphs: captions against those of people.

Prompts and decoding are those of the released configuration: "a photo of", 5 beams, 8 to 20 tokens; for
paragraphs 90 tokens with a repetition penalty of 1.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answers import answer_text, by_gold
from mm_interleaved.evaluation.metrics.captions import METRICS, caption_scores, spice_is_here
from mm_interleaved.evaluation.task import Task, TaskOptions
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    gold_documents,
    refuse_doubled_ids,
)

FILES: Mapping[str, tuple[str, ...]] = {
    "coco": ("coco_karpathy_test.json", "dataset_coco.json", "captions.json"),
    "flickr30k": ("flickr30k_test.json", "dataset_flickr30k.json"),
    "nocaps": ("nocaps_val_4500_captions.json", "nocaps_val.json"),
}
CAPTION_SETTINGS = {
    "layout": "T",
    "num_beams": 5,
    "min_new_tokens": 8,
    "max_new_tokens": 20,
    "length_penalty": 1.0,
}
PARAGRAPH_SETTINGS = {
    "layout": "T", "num_beams": 5, "min_new_tokens": 90, "max_new_tokens": 90, "repetition_penalty": 1.2,
}  # fmt: skip


def captioning(name: str, options: TaskOptions) -> Task:
    """The task of a data set of captions, `coco`, `flickr30k` or `nocaps`."""
    # The released evaluation cuts captions at their first full stop, for COCO alone.
    is_cut = options.compat == "released" and name == "coco"
    return Task(
        read_gold=partial(_read_captions, FILES[name], options),
        score=partial(_score, name, is_cut, _references),
        settings=CAPTION_SETTINGS,
        notes=(*_spice_note(), *(("captions are cut at the first full stop",) if is_cut else ())),
    )


def paragraphs(options: TaskOptions) -> Task:
    """Image paragraphs (Krause et al., arXiv 1611.06607)."""
    return Task(
        read_gold=partial(_read_paragraphs, options),
        score=partial(_score, "paragraphs", False, _target_text),
        settings=PARAGRAPH_SETTINGS,
        notes=_spice_note(),
    )


def _spice_note() -> tuple[str, ...]:
    return () if spice_is_here() else ("SPICE is not counted: pycocoevalcap has not got its models",)


def _read_captions(names: Sequence[str], options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, names)
    refuse_doubled_ids(path, "images", "annotations")
    settings: dict[str, Any] = {
        "paths": str(path), "one_per_image": True, "prompt": options.prompt or "caption-released",
    }  # fmt: skip
    if path.name.startswith("dataset_"):
        settings["split"] = "test"
    documents = gold_documents("captions", settings | options.source)
    bare = [document.id for document in documents if not any(document.meta["captions"])]
    if bare:
        raise InputError(
            f"{path}: found no caption of {escape(bare[0])!r} ({len(bare)} without), expected one or more",
            field="annotations",
        )
    [(image, count)] = Counter(str(document.images[0].name) for document in documents).most_common(1)
    if count > 1:
        raise InputError(f"{path}: the image {escape(image)!r} occurs twice", field="images")
    return documents


def _read_paragraphs(options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, ("paragraphs_coco.json", "paragraphs_v1.json"))
    settings: dict[str, Any] = {"paths": str(path), "prompt": options.prompt or "paragraph-released"}
    split = path.with_name("test_split.json")
    if split.is_file():
        settings["split_path"] = str(split)
    return gold_documents("paragraphs", settings | options.source)


def _references(document: Document) -> list[str]:
    return list(document.meta["captions"])


def _target_text(document: Document) -> list[str]:
    return [part.text for part in document.target if isinstance(part, Text)]


def _score(
    name: str, is_cut: bool, references: Any, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    captions = {
        document.id: answer_text(prediction)
        for document, prediction in zip(gold, by_gold(predictions, gold), strict=True)
    }
    if is_cut:
        captions = {key: text.split(".")[0] for key, text in captions.items()}
    metrics = (*METRICS, "SPICE") if spice_is_here() else METRICS
    scores = caption_scores(captions, {document.id: references(document) for document in gold}, metrics)
    return {f"{name}.{metric}": value for metric, value in scores.items()}
