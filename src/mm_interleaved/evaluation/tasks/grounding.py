"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what a phrase means, found where it overlaps by half."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.answers import answer_text, by_gold
from mm_interleaved.evaluation.metrics.boxes import Box, box_accuracy, in_thousandths
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    gold_documents,
    json_lines,
    refuse_doubled_ids,
)
from mm_interleaved.tokens.boxes import BOX_RANGE, read_box

NAMES = ("refcoco", "refcoco+", "refcocog")
SETTINGS = {"layout": "T", "num_beams": 5, "max_new_tokens": 30}
KEEP_DOUBLED = "keep_doubled"
"""A setting of the source: where two people said the same of one object, both count."""


def grounding(name: str, options: TaskOptions) -> Task:
    """The task of one of `NAMES`; its file is `<name>_<split>.jsonl`, by default of `val`."""
    is_released = options.compat == "released"
    return Task(
        read_gold=partial(_read, name, options),
        score=partial(_score, name, is_released),
        cases=each_alone(partial(_score, name, is_released)),
        settings=SETTINGS,
        notes=("true boxes are rounded to the grid of 0 to 999 first",) if is_released else (),
    )


def _read(name: str, options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, (f"{name}_val.jsonl", f"{name}_val.json", f"{name}*.jsonl"))
    settings: dict[str, Any] = {"paths": str(path), "prompt": options.prompt or "ground-released"}
    source = dict(options.source)
    if not source.pop(KEEP_DOUBLED, False):
        _refuse_doubled_lines(path)
    return gold_documents("refcoco", settings | source)


def _refuse_doubled_lines(path: Path) -> None:
    """The lines have no ids: one that says the same as an earlier one would count twice."""
    if path.suffix == ".json":
        refuse_doubled_ids(path, "images", "annotations")
        return
    seen: dict[str, int] = {}
    for record in json_lines(path):
        content = json.dumps(record.field.value, sort_keys=True)
        if content in seen:
            raise InputError(
                f"{record.place}: says the same as line {seen[content]}, which would count twice "
                f"(--set {KEEP_DOUBLED}=true keeps both)"
            )
        seen[content] = record.number


def _score(
    name: str, is_released: bool, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    found: list[Box | None] = []
    meant: list[Box] = []
    for document, prediction in zip(gold, by_gold(predictions, gold), strict=True):
        width, height = document.meta["image_size"]
        box = read_box(answer_text(prediction))
        left, top, right, bottom = document.meta["box"]
        true = (left, top, right, bottom)
        if is_released:
            # Compared on the grid; a box that cannot be read is the empty one.
            found.append(box)
            meant.append(in_thousandths(true, width, height))
        else:
            found.append(None if box is None else _in_pixels(box, width, height))
            meant.append(true)
    return {f"{name}.accuracy": box_accuracy(found, meant)}


def _in_pixels(box: tuple[int, int, int, int], width: int, height: int) -> Box:
    """An answer's cells are closed on both sides: the right one ends where the next begins."""
    left, top, right, bottom = box
    return (
        left * width / BOX_RANGE, top * height / BOX_RANGE,
        (right + 1) * width / BOX_RANGE, (bottom + 1) * height / BOX_RANGE,
    )  # fmt: skip
