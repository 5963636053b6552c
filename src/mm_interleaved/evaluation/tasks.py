"""The tasks that `evaluate` knows, by name."""

from __future__ import annotations

from pathlib import Path

from mm_interleaved.document import Document
from mm_interleaved.errors import InputError, escape
from mm_interleaved.evaluation.runner import Task, read_document_folder
from mm_interleaved.storyworld import tasks
from mm_interleaved.storyworld.scores import score


def _read_storyworld(data: Path) -> list[Document]:
    """Documents that `data storyworld` wrote; others are refused before a model runs for nothing."""
    documents = read_document_folder(data)
    for document in documents:
        task = document.meta.get("task")
        if task not in tasks.TASKS or not isinstance(document.meta.get("scenes"), list):
            raise InputError(
                f"{data}: document {escape(document.id)!r}: meta.task: found {escape(repr(task))}, "
                "expected a document that `data storyworld` wrote",
                field="meta.task",
            )
    return documents


TASKS = {
    "storyworld": Task(read_gold=_read_storyworld, score=score),
}
