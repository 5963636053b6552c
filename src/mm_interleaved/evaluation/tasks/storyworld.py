"""StoryWorld: the documents of `data storyworld`, and exact scores of what was answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answers import by_gold
from mm_interleaved.evaluation.metrics.confusion import Confusion
from mm_interleaved.evaluation.task import Cases, Task, TaskOptions
from mm_interleaved.storyworld.catalogue import ALL_TASKS
from mm_interleaved.storyworld.confusion import SURPLUS, kept_and_lost, values_of
from mm_interleaved.storyworld.detail.boards import IMAGE_SIZES, check_board
from mm_interleaved.storyworld.detail.documents import DETAIL_TASKS
from mm_interleaved.storyworld.scores import cases, score
from mm_interleaved.storyworld.world import check_scene
from mm_interleaved.tokens.boxes import read_box


def _read_storyworld(data: Path) -> list[Document]:
    """Documents that `data storyworld` wrote; others are refused before a model runs for nothing."""
    documents = read_documents(data / "documents.jsonl" if data.is_dir() else data)
    for document in documents:
        _check_gold(data, document)
    return documents


def _check_gold(data: Path, document: Document):
    """Refuses a document that lacks what its task's score needs, and names the field."""

    def refuse(field: str, expected: str, found: Any) -> NoReturn:
        raise InputError(
            f"{data}: document {escape(document.id)!r}: {field}: found {escape(repr(found))}, "
            f"expected {expected}, as `data storyworld` writes it",
            field=field,
        )

    meta = document.meta
    task = meta.get("task")
    if task not in ALL_TASKS:
        refuse("meta.task", "a task of StoryWorld", task)
    scenes = meta.get("scenes")
    if not isinstance(scenes, list) or not scenes:
        refuse("meta.scenes", "the truth of each image", scenes)
    for index, scene in enumerate(scenes):
        try:
            check_scene(scene)
            if task in DETAIL_TASKS:
                check_board(scene.get("board"))
        except ValueError as error:
            refuse(f"meta.scenes[{index}]", f"a scene ({error})", scene)
    if task in DETAIL_TASKS and meta.get("image_size") not in IMAGE_SIZES:
        refuse("meta.image_size", "64 or 128", meta.get("image_size"))
    if task == "vqa" and not isinstance(meta.get("is_fine_detail"), bool):
        refuse("meta.is_fine_detail", "true or false", meta.get("is_fine_detail"))
    if task == "dialogue":
        _check_candidates(meta, refuse)
    answer = " ".join(part.text for part in document.target if isinstance(part, Text))
    if task == "ground" and read_box(answer) is None:
        refuse("target", "a box", answer)


def _check_candidates(meta: Mapping[str, Any], refuse: Callable[[str, str, Any], NoReturn]):
    candidates, gold_index = meta.get("candidates"), meta.get("gold_index")
    is_list = isinstance(candidates, list) and all(isinstance(text, str) for text in candidates)
    if not is_list or not candidates:
        refuse("meta.candidates", "a list of strings", candidates)
    # True would pass as 1.
    if type(gold_index) is not int or not 0 <= gold_index < len(candidates):
        refuse("meta.gold_index", f"a whole number from 0 to {len(candidates) - 1}", gold_index)


def _score_storyworld(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    """All scores; and as `held_out.<task>.<metric>` those of documents with a held-out character, one that
    training never shows.
    """
    held_out = [document for document in gold if document.meta.get("is_held_out")]
    ids = {document.id for document in held_out}
    answers = [answer for answer in predictions if answer.id in ids]
    return score(predictions, gold) | {
        f"held_out.{name}": value for name, value in score(answers, held_out).items()
    }


def _cases(prediction: Document | None, document: Document) -> Cases:
    found = cases(prediction, document)
    held_out = found if document.meta.get("is_held_out") else {}
    return found | {f"held_out.{name}": values for name, values in held_out.items()}


def _confusions(predictions: Sequence[Document], gold: Sequence[Document]) -> list[Confusion]:
    """One table for each task and attribute that has cases, in the order of first occurrence."""
    tables: dict[tuple[str, str], Confusion] = {}
    for document, prediction in zip(gold, by_gold(predictions, gold), strict=True):
        task = document.meta["task"]
        for attribute, truth, read in kept_and_lost(prediction, document):
            if (task, attribute) not in tables:
                tables[task, attribute] = Confusion(
                    task=task, attribute=attribute, order=values_of(attribute), surplus=SURPLUS
                )
            tables[task, attribute].counts[truth, read] += 1
    return list(tables.values())


STORYWORLD = Task(
    name="storyworld",
    read_gold=_read_storyworld,
    score=_score_storyworld,
    cases=_cases,
    confusions=_confusions,
)


def storyworld(options: TaskOptions) -> Task:
    """The task; it has no options."""
    return STORYWORLD
