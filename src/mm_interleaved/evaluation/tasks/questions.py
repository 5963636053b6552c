"""VQAv2, OK-VQA, TextVQA, VizWiz and GQA: short answers to questions about images.

Prompts and decoding are the published ones: one word asked for, 3 beams, at most 10 tokens, length penalty 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mm_interleaved.data.storage.records import read_table
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.answers import answer_text, by_gold
from mm_interleaved.evaluation.metrics.vqa import (
    exact_accuracy,
    mean_vqa_accuracy,
    released_clean_up,
    vizwiz_accuracy,
    vqa_accuracy,
)
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone
from mm_interleaved.evaluation.tasks.annotations import (
    annotation_file,
    each_once,
    gold_documents,
    question_about,
)

SETTINGS = {"layout": "T", "num_beams": 3, "min_new_tokens": 0, "max_new_tokens": 10, "length_penalty": 0.0}


class _Files(NamedTuple):
    questions: tuple[str, ...]
    annotations: tuple[str, ...] = ()
    """Where answers stand in a file of their own."""
    prompt: str = "question-released"


FILES: Mapping[str, _Files] = {
    "vqav2": _Files(
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions.json"),
        ("v2_mscoco_val2014_annotations.json", "annotations.json"),
    ),
    "okvqa": _Files(("OpenEnded_mscoco_val2014_questions.json",), ("mscoco_val2014_annotations.json",)),
    "textvqa": _Files(
        ("TextVQA_0.5.1_val.json", "textvqa_val_questions.json"), ("textvqa_val_annotations.json",)
    ),
    "vizwiz": _Files(("val.json",), prompt="question-released-vizwiz"),
}


GQA_FILES = ("testdev_balanced_questions.json", "val_balanced_questions.json", "gqa*.json")


def questions(name: str, options: TaskOptions) -> Task:
    """The task of a data set of questions, a key of `FILES`."""
    is_released = options.compat == "released"
    return Task(
        read_gold=partial(_read, name, FILES[name], options),
        score=partial(_score, name, is_released),
        cases=each_alone(partial(_score, name, is_released)),
        settings=SETTINGS,
        notes=("answers are cut at substrings before they are normalised",) if is_released else (),
    )


def _read(name: str, files: _Files, options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, files.questions)
    settings: dict[str, Any] = {"paths": str(path), "prompt": options.prompt or files.prompt}
    if files.annotations and data.is_dir() and not path.name.startswith("TextVQA"):
        settings["annotations"] = str(annotation_file(data, files.annotations))
    documents = gold_documents("vqa", settings | options.source)
    if (annotations := settings.get("annotations")) is not None and "annotations" not in options.source:
        _refuse_lost_annotations(annotations, path, len(documents))
    bare = [document.id for document in documents if not (document.meta.get("answers") or document.target)]
    if bare:
        raise InputError(
            f"{path}: {name} needs answers, question {escape(bare[0])!r} has none ({len(bare)} without); "
            "test splits are scored by their servers",
            field="answers",
        )
    asked = Counter(str(document.meta.get("question_id", document.id)) for document in documents)
    [(question_id, count)] = asked.most_common(1)
    if count > 1:
        raise InputError(f"{path}: question_id {escape(question_id)!r} occurs twice", field="question_id")
    return documents


def _refuse_lost_annotations(annotations: str, path: Path, num_questions: int) -> None:
    """Answers to questions that are not there: the file of questions is not whole, or another's."""
    found = len(read_table(annotations, "annotations", "questions")["annotations"].list())
    if found > num_questions:
        raise InputError(
            f"{annotations}: found {found} annotations, expected {num_questions}, one of each question in "
            f"{path}",
            field="annotations",
        )


def gqa(options: TaskOptions) -> Task:
    """GQA's balanced questions, `{id: {"imageId", "question", "answer"}}`: the one answer, or wrong."""
    return Task(
        read_gold=partial(_read_gqa, options),
        score=_score_gqa,
        cases=each_alone(_score_gqa),
        settings=SETTINGS,
    )


def _read_gqa(options: TaskOptions, data: Path) -> list[Document]:
    path = annotation_file(data, GQA_FILES)
    options = options if options.prompt else replace(options, prompt="question-released")
    try:
        table = read_table(str(path))
        made = [_gqa_document(options, path, key, table[key]) for key in table.object()]
    except FieldError as error:
        raise error.at(str(path)) from error
    return each_once(path, made)


def _gqa_document(options: TaskOptions, path: Path, key: str, record: Field) -> Document:
    answer = Text(record["answer"].text())
    if not answer.text.strip():
        record["answer"].wrong("an answer to score against")
    return question_about(options, path, record, f"gqa:{key}", record["question"].text(), (answer,), {})


def _score_gqa(predictions: Sequence[Document], gold: Sequence[Document]) -> dict[str, float]:
    answers = [_first_line(answer_text(prediction)).rstrip(".") for prediction in by_gold(predictions, gold)]
    truths = [" ".join(part.text for part in one.target if isinstance(part, Text)) for one in gold]
    return {"gqa.accuracy": exact_accuracy(answers, truths)}


def _score(
    name: str, is_released: bool, predictions: Sequence[Document], gold: Sequence[Document]
) -> dict[str, float]:
    answers = [_first_line(answer_text(prediction)) for prediction in by_gold(predictions, gold)]
    if is_released:
        answers = list(map(released_clean_up, answers))
    people = [document.meta["answers"] for document in gold]
    accuracy = vizwiz_accuracy if name == "vizwiz" else vqa_accuracy
    return {f"{name}.accuracy": mean_vqa_accuracy(answers, people, accuracy)}


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
