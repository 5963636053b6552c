"""What an evaluation needs to know of a task: its documents with a hole, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_interleaved.documents.document import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task."""

    read_gold: Callable[[Path], list[Document]]
    """All documents of a data folder, with their targets."""
    score: Callable[[Sequence[Document], Sequence[Document]], dict[str, float]]
    """(predictions, gold) -> metrics. Never sees a model."""
