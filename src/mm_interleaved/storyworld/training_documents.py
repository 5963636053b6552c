"""What is learned from: the documents of all tasks, whole, and two more tasks of training's own.

These are interviews, many questions about one image, which teach more about it per second than one question
does: about any scene, and about a scene's board.
"""

from collections.abc import Mapping
from dataclasses import replace

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.catalogue import document_of
from mm_interleaved.storyworld.detail.boards import detail_to_record, random_detail_scene
from mm_interleaved.storyworld.detail.documents import ask_cell, detail_image
from mm_interleaved.storyworld.questions import FINE_DETAIL, QUESTIONS, RELATIONS, ask_several
from mm_interleaved.storyworld.tasks import scene_image
from mm_interleaved.storyworld.world import random_cast, random_scene, scene_to_record

INTERVIEW = "interview"
DETAIL_INTERVIEW = "detail_interview"
INTERVIEWS = (INTERVIEW, DETAIL_INTERVIEW)
# Domain of the seeds, so that no two streams share their random numbers (those of the tasks are below 10).
_MIXTURE_DOMAIN = 21
_INTERVIEW_DOMAIN = 22
_DETAIL_INTERVIEW_DOMAIN = 24
_NUM_CELLS_ASKED = 8


def training_document(seed: int, index: int, task_weights: Mapping[str, int]) -> Document:
    """Document number `index` of a training mixture, its target appended to its parts so that all of it is
    learned.

    Args:
        task_weights: tasks of `storyworld.catalogue`, "interview" or "detail_interview", with integer
            weights.
    """
    task = SeededRandom(_MIXTURE_DOMAIN, seed, index).weighted(
        tuple(task_weights), tuple(task_weights.values())
    )
    if task == INTERVIEW:
        return _interview(seed, index)
    if task == DETAIL_INTERVIEW:
        return _detail_interview(seed, index)
    made = document_of("train", seed, index, task)
    return replace(made, parts=(*made.parts, *made.target), target=())


def _interview(seed: int, index: int) -> Document:
    """An image, questions about the badge and pattern of each figure, one of each relation, and questions
    about anything.
    """
    rng = SeededRandom(_INTERVIEW_DOMAIN, seed, index)
    scene = random_scene(rng, "train")
    questions = {
        question.text: question
        for figure in scene.figures
        for kind in FINE_DETAIL
        if (question := QUESTIONS[kind](rng, replace(scene, figures=(figure,)))) is not None
    }
    relations = (QUESTIONS[kind](rng, scene) for kind in RELATIONS)
    questions.update((question.text, question) for question in relations if question is not None)
    questions.update((question.text, question) for question in ask_several(rng, scene, 7))
    parts = [scene_image(scene, "user")]
    for question in rng.sample(list(questions.values()), len(questions)):
        parts += [Text(question.text, role="user"), Text(question.answer, role="assistant")]
    meta = {"task": INTERVIEW, "scenes": [scene_to_record(scene)]}
    return Document(id=f"interview-{seed}-{index}", parts=tuple(parts), meta=meta)


def _detail_interview(seed: int, index: int) -> Document:
    """An image, questions about cells of its board, and some about anything else."""
    rng = SeededRandom(_DETAIL_INTERVIEW_DOMAIN, seed, index)
    detail = random_detail_scene(rng, random_cast(rng, "train", 1)[0])
    asked = dict(ask_cell(rng, detail) for _ in range(_NUM_CELLS_ASKED))
    asked |= {question.text: question.answer for question in ask_several(rng, detail.scene, 3)}
    parts = [detail_image(detail, "user")]
    for text, answer in rng.sample(list(asked.items()), len(asked)):
        parts += [Text(text, role="user"), Text(answer, role="assistant")]
    meta = {"task": DETAIL_INTERVIEW, "scenes": [detail_to_record(detail)]}
    return Document(id=f"detail-interview-{seed}-{index}", parts=tuple(parts), meta=meta)
