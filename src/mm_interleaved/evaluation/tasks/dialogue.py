"""VisDial 1.0: a hundred candidate answers to each question of a dialogue about an image, ranked."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_interleaved.data.storage.records import read_table
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answering import Ranking
from mm_interleaved.evaluation.answers import answer_ranking, by_gold
from mm_interleaved.evaluation.metrics.retrieval import ndcg, ranking_scores
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    each_once,
    gold_documents,
    has_annotation_file,
    identity,
)

DIALOGUES = ("visdial_1.0_val.json", "visdial.json")
DENSE = ("visdial_1.0_val_dense_annotations.json",)


def visual_dialogue(options: TaskOptions) -> Task:
    """The task; candidates are ranked by their likelihood, the answer that is generated does not count.

    Every round that has candidates is asked; NDCG is of those with dense annotations. The released
    evaluation asks these alone, leaves out the round before the question, and takes a candidate's likelihood
    without its end, which favours short ones.
    """
    is_released = options.compat == "released"
    notes = (
        "one round a dialogue",
        "the round before the question is left out of the dialogue",
        "the end of a candidate does not count",
    )
    return Task(
        read_gold=partial(_read, is_released, options),
        score=_score,
        cases=each_alone(_score),
        settings={"layout": "T", "max_new_tokens": 16},
        ranking=Ranking(is_answer=True, counts_end=not is_released),
        notes=notes if is_released else (),
    )


def _read(is_released: bool, options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, DIALOGUES)
    folder = data if data.is_dir() else data.parent
    settings: dict[str, Any] = {
        "paths": str(path),
        "is_conversation": options.prompt == "conversation",
        "skips_previous_round": is_released,
        "every_round": not is_released,
    }
    if has_annotation_file(folder, DENSE):
        settings["dense_annotations"] = str(annotation_file(folder, DENSE))
    documents = gold_documents("visdial", settings | options.source)
    shown = _refuse_doubled_dialogues(path)
    if (dense := settings.get("dense_annotations")) is not None:
        _check_dense(Path(dense), shown)
    for document in documents:
        if not {"candidates", "gold_index"} <= document.meta.keys():
            raise InputError(
                f"{path}: {document.id}: expected answer_options and gt_index (test splits lack them)",
                field="answer_options",
            )
        _check_relevance(path, document)
    # A single candidate is no question.
    return each_once(path, [one for one in documents if len(one.meta["candidates"]) > 1])


def _check_dense(path: Path, shown: Set[str]) -> None:
    """An annotation of a round that is asked, and one of each: others would change the gain unseen."""
    seen: set[str] = set()
    try:
        for entry in read_table(str(path)).list():
            key = identity(entry["image_id"])
            if key not in shown:
                raise FieldError(f"{entry.path}.image_id", f"found no dialogue about the image {key}")
            if key in seen:
                raise FieldError(f"{entry.path}.image_id", f"{key} occurs twice")
            seen.add(key)
    except FieldError as error:
        raise error.at(str(path)) from error


def _refuse_doubled_dialogues(path: Path) -> set[str]:
    """A dialogue an image: a second one would count twice. Returns their images."""
    seen: set[str] = set()
    for dialog in read_table(str(path))["data"]["dialogs"].list():
        key = str(dialog["image_id"].value)
        if key in seen:
            raise InputError(f"{path}: {dialog.path}.image_id: {escape(key)} occurs twice", field="image_id")
        seen.add(key)
    return seen


def _check_relevance(path: Path, document: Document) -> None:
    relevance, count = document.meta.get("relevance"), len(document.meta["candidates"])
    if relevance is not None and (len(relevance) != count or not any(relevance)):
        raise InputError(
            f"{path}: {document.id}: gt_relevance: found {len(relevance)} numbers, "
            f"{sum(map(bool, relevance))} above 0, expected one for each of {count} candidates, and one "
            "above 0",
            field="gt_relevance",
        )


def _score(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    bare = [one.id for one in predictions if "ranking" not in one.meta]
    if bare:
        raise InputError(
            f"visdial: the answer to {escape(bare[0])!r} has no meta.ranking ({len(bare)} without), expected "
            "the indices of its candidates from the likeliest on",
            field="meta.ranking",
        )
    rankings = [answer_ranking(prediction) for prediction in by_gold(predictions, gold)]
    # What was not ranked counts as the worst, as everywhere.
    complete = [ranking or _worst(document) for ranking, document in zip(rankings, gold, strict=True)]
    scores = ranking_scores(complete, [document.meta["gold_index"] for document in gold])
    pairs = zip(complete, gold, strict=True)
    gains = [
        ndcg(ranking, document.meta["relevance"])
        for ranking, document in pairs
        if "relevance" in document.meta
    ]
    return {
        **({"visdial.ndcg": fmean(gains)} if gains else {}),
        "visdial.mrr": scores.mrr,
        **{f"visdial.recall_at_{limit}": share for limit, share in scores.recall.items()},
        "visdial.mean_rank": scores.mean_rank,
    }


def _worst(document: Document) -> list[int]:
    """The candidates from the least relevant on, the right answer last."""
    count, gold = len(document.meta["candidates"]), document.meta["gold_index"]
    relevance = document.meta.get("relevance") or [0.0] * count
    return sorted(range(count), key=lambda index: (index == gold, relevance[index]))
