"""Questions about images: VQAv2, OK-VQA, TextVQA, VizWiz.

Read are the official questions with their annotations (VQAv2, OK-VQA and what was brought into their form),
TextVQA's own file (`{"data": [...]}`) and VizWiz's list. Without answers (test splits) the target is empty.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated

from mm_interleaved.data.source import Item, Shard, attempt
from mm_interleaved.data.storage.files import fingerprint, found_files, stem_of
from mm_interleaved.data.storage.image_stores import first_image, found_with_images, image_store
from mm_interleaved.data.storage.records import REMEMBERED_TABLES, read_table, whole_table
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.image_references import ImageStore
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import UsageError
from mm_interleaved.tokens.task_prompts import PROMPTS, QUESTION, TaskPrompt
from mm_interleaved.typed_settings import Named

_KNOWN = ("raw_answer", "question_id", "image_id", "answer_id")
"""Fields of the official files that say again what others say."""
_PLACE = re.compile(r"\{image_id(?::0?(\d+))?\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualQuestions:
    """A question about an image; the target is the answer that most people gave, `meta.answers` has all."""

    paths: str | tuple[str, ...]
    """Files of questions."""
    annotations: str | tuple[str, ...] | None = None
    """The annotation file of each file of questions, in the same order; None where answers stand beside the
    questions, or there are none."""
    images: str | None = None
    """Folder, address or tars of the images; by default the table's folder (above `annotations`)."""
    image_name: str | None = None
    """The name of an image, such as `COCO_train2014_{image_id:012}.jpg`. None: the question's `image`, or
    COCO's name of the questions' `data_subtype`, or `<image_id>.jpg`."""
    prompt: Annotated[TaskPrompt, Named(PROMPTS)] = QUESTION

    def shards(self) -> list[Shard]:
        found_with_images(self.paths, self.images)
        answers = self._answers()
        for path in filter(None, answers.values()):
            _annotations(fingerprint(path))
        return [Shard(path, len(_questions(path))) for path in answers]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        store = image_store(self.images, path, skip_missing=True)
        answers_path = self._answers()[path]
        answers = {} if answers_path is None else _annotations(fingerprint(answers_path))
        name_rule = self.image_name or _coco_name(path)
        for position, question in enumerate(_questions(path)[start:], start):
            build = partial(self._document, f"{stem_of(path)}:{position}", name_rule, store)
            found = None if answers_path is None else answers.get(_id(question))
            # Answers stand beside the question where there is no other file of them.
            build = partial(build, has_answers=answers_path is None or found is not None)
            records = (question,) if found is None else (question, found)
            yield position, attempt(f"{path}: {question.path}", build, *records, known=_KNOWN)

    def _answers(self) -> Mapping[str, str | None]:
        """Files of questions, and the file of each one's answers."""
        questions = found_files(self.paths)
        if self.annotations is None:
            return dict.fromkeys(questions)
        annotations = found_files(self.annotations)
        if len(annotations) != len(questions):
            raise UsageError(
                f"annotations: found {len(annotations)} files, expected {len(questions)} as in paths",
                field="annotations",
            )
        return dict(zip(questions, annotations, strict=True))

    def _document(
        self,
        name: str,
        name_rule: str | None,
        store: ImageStore,
        question: Field,
        annotation: Field | None = None,
        *,
        has_answers: bool,
    ) -> Document:
        answers = question if annotation is None else annotation
        if not has_answers:
            raise FieldError(f"{question.path}.question_id", "found no annotation of this question, or two")
        image = first_image(store, _image_names(question, name_rule), question.path, self.prompt.role)
        text = question["question"].text().strip()
        given = _given_answers(answers)
        meta = {"question": text}
        for key in ("question_id", "question_type", "answer_type"):
            entry = question.get(key) or answers.get(key)
            meta |= {} if entry is None else {key: entry.value}
        return Document(
            id=name,
            parts=self.prompt.parts(image, text),
            target=self.prompt.answer(_best(answers, given)) if given else (),
            layout="T",
            meta={**meta, "answers": given} if given else meta,
        )


def _given_answers(record: Field) -> list[str]:
    """All answers, as people gave them."""
    answers = record.get("answers")
    if answers is None:
        return []
    return [
        (item if isinstance(item.value, str) else item["answer"]).text().strip() for item in answers.list()
    ]


def _best(record: Field, given: list[str]) -> str:
    """The official choice, or the answer given most often, the first of equals; blank where all are."""
    chosen = record.get("multiple_choice_answer")
    if chosen is not None:
        return chosen.text()
    return Counter(list(filter(None, given)) or given).most_common(1)[0][0]


def _image_names(question: Field, name_rule: str | None) -> list[str]:
    image = question.get("image")
    if image is not None:
        return [image.text()]
    image_id = question["image_id"].value
    if name_rule is None:
        return [f"{image_id}.jpg", f"{image_id}.png"]
    return [_PLACE.sub(lambda match: str(image_id).zfill(int(match[1] or 0)), name_rule)]


def _questions(path: str) -> list[Field]:
    table = read_table(path, "data", "questions")
    try:
        if isinstance(table.value, list):
            return table.list()
        return table["data" if "data" in table else "questions"].list()
    except FieldError as error:
        raise error.at(path) from error


def _coco_name(path: str) -> str | None:
    subtype = whole_table(path).get("data_subtype")
    try:
        return None if subtype is None else f"COCO_{subtype.text()}_{{image_id:012}}.jpg"
    except FieldError as error:
        raise error.at(path) from error


def _id(record: Field) -> str:
    """The question's id, of a question or an annotation; empty where it is missing."""
    given = record.get("question_id")
    return "" if given is None else str(given.value)


@lru_cache(maxsize=REMEMBERED_TABLES)
def _annotations(key: tuple[str, int, int]) -> Mapping[str, Field | None]:
    """Annotations by the id of their question; None where a question has two."""
    path = key[0]
    found: dict[str, Field | None] = {}
    try:
        for record in read_table(path, "annotations", "questions")["annotations"].list():
            # One without an id leaves its question without an annotation, which is reported there.
            number = _id(record)
            found[number] = None if number in found else record
    except FieldError as error:
        raise error.at(path) from error
    return found
