"""The tasks that `evaluate` knows, by name."""

from __future__ import annotations

from mm_interleaved.evaluation.runner import Task, read_document_folder
from mm_interleaved.storyworld.scores import score

TASKS = {
    "storyworld": Task(read_gold=read_document_folder, score=score),
}
