"""Generated images against real ones: MS-COCO, LN-COCO, ADE20K maps, VIST, PororoSV, FlintstonesSV.

FID and KID need an Inception (`--inception`), agreement with the text and with the real image a CLIP
(`--clip`), mean IoU of images made from maps a segmentation (`--segmenter`): without any of them there is
nothing to score, and that is said before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import open_image
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.evaluation.answers import answer_images, by_gold
from mm_interleaved.evaluation.extractors import ClipEmbedder, ClipRanker, InceptionFeatures, Segmenter
from mm_interleaved.evaluation.metrics.images import (
    clip_score,
    distribution_distances,
    image_similarity,
    released_pixels,
)
from mm_interleaved.evaluation.metrics.segmentation import confusion, mean_iou
from mm_interleaved.evaluation.task import ImageRankers, Task, TaskOptions
from mm_interleaved.evaluation.tasks.annotations import annotation_file, gold_documents
from mm_interleaved.evaluation.tasks.drawn_captions import NUM_DRAWN, read_coco, read_narratives

TEXT_TO_IMAGE_SETTINGS = {"layout": "I", "num_inference_steps": 250, "guidance_scale": 3.5}
OTHER_SETTINGS = {"num_inference_steps": 30, "guidance_scale": 7.5}
NUM_CANDIDATES = 8
"""Of MS-COCO's images, the best of which by CLIP counts (section 4 of the paper)."""
STORIES: Mapping[str, tuple[str, ...]] = {
    "vist": (
        "val_formatted_filtered.json",
        "test_formatted_filtered.json",
        "*.story-in-sequence.json",
        "formatted.json",
    ),
    "pororosv": ("pororosv.jsonl", "*pororo*.jsonl"),
    "flintstonessv": ("flintstonessv.jsonl", "*flintstones*.jsonl"),
}
_BATCH = 64


def text_to_image(name: str, options: TaskOptions) -> Task:
    """`coco-images` (val2014, the first caption of each) or `lncoco-images` (localised narratives)."""
    _check(name, options)
    settings: dict[str, Any] = dict(TEXT_TO_IMAGE_SETTINGS)
    notes = _notes(options)
    if name == "coco-images":
        if options.clip is None:
            notes += (f"one sample an image; published is the best of {NUM_CANDIDATES} by a CLIP (--clip)",)
        else:
            settings["num_candidates"] = NUM_CANDIDATES
            notes += (f"the best of {NUM_CANDIDATES} candidates by {options.clip}",)
    is_coco = name == "coco-images"
    if is_coco:
        notes += (f"captions in lower case, the first {NUM_DRAWN} images",)
    elif options.compat == "released":
        notes += (f"narratives are drawn once more until there are {NUM_DRAWN}",)
    return Task(
        read_gold=partial(read_coco if is_coco else read_narratives, options),
        score=partial(_score, name, options),
        settings=settings,
        notes=notes,
        image_ranker=_ranker(options),
    )


def stories(name: str, options: TaskOptions) -> Task:
    """Images of a story's last panel, or of all that follow the given ones."""
    _check(name, options)
    return Task(
        read_gold=partial(_read_stories, name, options),
        score=partial(_score, name, options),
        settings=OTHER_SETTINGS,
        notes=_notes(options),
    )


def maps_to_images(options: TaskOptions) -> Task:
    """ADE20K: an image out of its segmentation map and a caption."""
    if options.segmenter is None:
        _check("ade20k", options)
    return Task(
        read_gold=partial(_read_maps, options),
        score=partial(_score_maps, options),
        settings=OTHER_SETTINGS,
        notes=_notes(options),
        image_ranker=_ranker(options),
    )


def _check(name: str, options: TaskOptions) -> None:
    if options.inception is None and options.clip is None:
        raise UsageError(
            f"{name}: expected --inception (FID, KID), --clip (agreement)"
            f"{', --segmenter (mean IoU)' if name == 'ade20k' else ''} or more of them, found none"
        )


def _ranker(options: TaskOptions) -> ImageRankers | None:
    """CLIP chooses among candidates where there is one; how many there are is a setting."""
    clip = options.clip
    if clip is None:
        return None
    return ImageRankers(name=f"clip {clip}", make=lambda: ClipRanker(ClipEmbedder(clip)))


def _notes(options: TaskOptions) -> tuple[str, ...]:
    return ("both sides are shrunk to 64 pixels before Inception",) if options.compat == "released" else ()


def _read_stories(name: str, options: TaskOptions, data: Path) -> list[Document]:
    settings: dict[str, Any] = {"paths": str(annotation_file(data, STORIES[name]))}
    if name != "vist":
        # One frame of a strip, always the same: an evaluation chooses nothing at random.
        settings |= {"frame": 0, "split": "test"}
    return gold_documents(name, settings | options.source)


def _read_maps(options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, ("validation.json", "captions.json"))
    return gold_documents("ade20k", {"paths": str(path), "caption_end": "."} | options.source)


def _score(
    name: str, options: TaskOptions, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    """Images in the places of the real ones; a document with another number of them has none that fits."""
    real: list[Image] = []
    made: list[Image] = []
    texts: list[str] = []
    num_wanted = 0
    for document, prediction in zip(gold, by_gold(predictions, gold), strict=True):
        wanted, found = _images(document.target), answer_images(prediction)
        num_wanted += len(wanted)
        if len(found) == len(wanted):
            real, made = real + wanted, made + found
            texts += _texts_before(document, len(wanted))
    scores = {f"{name}.complete": len(made) / num_wanted if num_wanted else 0.0}
    if not made:
        return scores
    if options.inception is not None:
        extractor = InceptionFeatures(options.inception)
        sides = (_batches(side, options.compat == "released") for side in (_all_images(gold), made))
        found = distribution_distances(*sides, extractor)
        scores |= {f"{name}.{metric}": value for metric, value in found.items()}
    if options.clip is not None:
        embedder = ClipEmbedder(options.clip)
        of_made, of_real = (_embedded(embedder, side) for side in (made, real))
        of_texts = np.concatenate(
            [embedder.texts(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        )
        scores[f"{name}.clip_score"] = clip_score(of_texts, of_made)
        scores[f"{name}.image_similarity"] = image_similarity(of_made, of_real)
    return scores


def _score_maps(
    options: TaskOptions, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    scores = _score("ade20k", options, predictions, gold)
    if options.segmenter is None:
        return scores
    segmenter = Segmenter(options.segmenter)
    counts: list[np.ndarray] = []
    for document, prediction in zip(gold, by_gold(predictions, gold), strict=True):
        made = answer_images(prediction)
        if len(made) == 1:
            image = made[0].load().convert("RGB")
            truth = _true_classes(document, image.size)
            # Of the truth's labels, 0 is none of the classes.
            if truth.max() > segmenter.num_classes:
                raise UsageError(
                    f"segmenter: {escape(options.segmenter)!r} knows {segmenter.num_classes} classes, "
                    f"expected those of the labels: document {escape(document.id)!r} has {truth.max()}",
                    field="segmenter",
                )
            found = segmenter.classes(image) + 1
            counts.append(confusion(found, truth, segmenter.num_classes + 1, ignored=0))
    return scores | ({"ade20k.miou": mean_iou(counts)} if counts else {})


def _true_classes(document: Document, size: tuple[int, int]) -> np.ndarray:
    """(H, W): the labels from 1 of a document's map, cropped and shrunk as the model saw it; 0 is no class.

    Raises:
        InputError: there is no `annotations` beside the coloured maps.
    """
    coloured = _images(document.parts)[0].source
    name = str(coloured).replace("annotations_with_color", "annotations")
    path = Path(name) if isinstance(coloured, Path) else None
    if path is None or not path.is_file():
        raise InputError(
            f"document {escape(document.id)!r}: mean IoU needs the map of its labels, found no file {name!r}"
        )
    labels = open_image(path)
    side = min(labels.size)
    left, top = (labels.width - side) // 2, (labels.height - side) // 2
    square = labels.crop((left, top, left + side, top + side))
    return np.asarray(square.convert("L").resize(size, PILImage.Resampling.NEAREST), np.int64)


def _images(parts: Sequence[Any]) -> list[Image]:
    return [part for part in parts if isinstance(part, Image)]


def _all_images(gold: Sequence[Document]) -> list[Image]:
    return [image for document in gold for image in _images(document.target)]


def _texts_before(document: Document, count: int) -> list[str]:
    """The text that stands last before each image of the target."""
    found, last = [], ""
    for part in (*document.parts, None, *document.target):
        if isinstance(part, Text):
            last = part.text
        elif part is None:
            found.clear()
        else:
            found.append(last)
    return found[:count]


def _batches(images: Sequence[Image], is_released: bool) -> Iterator[Tensor]:
    for image in images:
        pixels = torch.from_numpy(np.array(image.load().convert("RGB"))).permute(2, 0, 1)[None]
        yield released_pixels(pixels) if is_released else pixels


def _embedded(embedder: ClipEmbedder, images: Sequence[Image]) -> np.ndarray:
    chunks = (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))
    return np.concatenate([embedder.images(_opened(chunk)) for chunk in chunks])


def _opened(images: Sequence[Image]) -> list[PILImage.Image]:
    return [image.load().convert("RGB") for image in images]
