"""POPE and SEED-Bench: questions whose choices are given.

POPE (arXiv 2305.10355) asks for yes or no. SEED-Bench (arXiv 2307.16125) gives four options, which are ranked
by their likelihood, as its authors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mm_interleaved.data.storage.records import whole_table
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.evaluation.answering import Ranking
from mm_interleaved.evaluation.answers import answer_ranking, answer_text, by_gold
from mm_interleaved.evaluation.metrics.choices import (
    choice_accuracy,
    read_choice,
    says_yes,
    yes_no_scores,
)
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    each_once,
    identity,
    json_lines,
    question_about,
)

POPE_FILES = ("coco_pope_random.json", "coco_pope_popular.json", "coco_pope_adversarial.json", "*pope*.json*")
SEED_FILES = ("SEED-Bench.json", "SEED-Bench-2.json", "seed_bench.json")
_LETTERS = "ABCD"


def pope(options: TaskOptions) -> Task:
    """Whether an object is in an image: accuracy, precision, recall, F1 and how often yes is said."""
    return Task(
        read_gold=partial(_read_pope, options),
        score=_score_pope,
        cases=each_alone(_score_pope, "accuracy", "yes_ratio"),
        settings={"layout": "T", "max_new_tokens": 10},
    )


def seed_bench(options: TaskOptions) -> Task:
    """Four options a question: accuracy, in all and by type of question."""
    return Task(
        read_gold=partial(_read_seed, options),
        score=_score_seed,
        cases=each_alone(_score_seed),
        ranking=Ranking(is_answer=True),
        settings={"layout": "T", "max_new_tokens": 4},
    )


def _read_pope(options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, POPE_FILES)
    made = [_pope_document(options, path, record.field, record.place) for record in json_lines(path)]
    return each_once(path, made)


def _pope_document(options: TaskOptions, path: Path, record: Field, place: str) -> Document:
    try:
        label = record["label"].text().strip().lower()
        if label not in ("yes", "no"):
            record["label"].wrong("yes or no")
        question = record["text" if "text" in record else "question"].text()
        return question_about(
            options, path, record, f"pope:{identity(record['question_id'])}", question, (Text(label),),
            {"is_yes": label == "yes"},
        )  # fmt: skip
    except FieldError as error:
        raise error.at(place) from error


def _read_seed(options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, SEED_FILES)
    try:
        made = [_seed_document(options, path, one) for one in whole_table(str(path))["questions"].list()]
    except FieldError as error:
        raise error.at(str(path)) from error
    return each_once(path, made)


def _seed_document(options: TaskOptions, path: Path, record: Field) -> Document:
    choices = [record[f"choice_{letter.lower()}"].text() for letter in _LETTERS]
    answer = record["answer"].text().strip().upper()
    if answer not in _LETTERS or len(answer) != 1:
        record["answer"].wrong("one of A, B, C, D")
    right = _LETTERS.index(answer)
    kind = record.get("question_type_id")
    meta = {"candidates": choices, "gold_index": right, "kind": "" if kind is None else str(kind.value)}
    name, question = f"seed:{identity(record['question_id'])}", record["question"].text()
    return question_about(options, path, record, name, question, (Text(choices[right]),), meta)


def _score_pope(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    texts = [answer_text(prediction) for prediction in by_gold(predictions, gold)]
    # Nothing said is no yes, although it does not deny: what failed must not count as right.
    answers = [says_yes(text) if text else None for text in texts]
    scores = yes_no_scores(answers, [document.meta["is_yes"] for document in gold])
    return {
        f"pope.{name}": getattr(scores, name)
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }


def _score_seed(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    chosen = [_choice(one, question) for one, question in zip(by_gold(predictions, gold), gold, strict=True)]
    right = [document.meta["gold_index"] for document in gold]
    scores = {"seed-bench.accuracy": choice_accuracy(chosen, right)}
    for kind in sorted({document.meta["kind"] for document in gold} - {""}):
        own = [place for place, document in enumerate(gold) if document.meta["kind"] == kind]
        scores[f"seed-bench.accuracy.type_{kind}"] = choice_accuracy(
            [chosen[place] for place in own], [right[place] for place in own]
        )
    return scores


def _choice(prediction: Document | None, question: Document) -> int | None:
    """The likeliest of the options, or where they were not ranked, the one that the answer names."""
    ranking = answer_ranking(prediction)
    return ranking[0] if ranking else read_choice(answer_text(prediction), question.meta["candidates"])
