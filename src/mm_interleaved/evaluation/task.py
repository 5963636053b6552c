"""What an evaluation needs to know of a task: its documents with a hole, how they are answered and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.judges.judge import Judge


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What a user may choose of a task."""

    compat: str | None = None
    """`released` reproduces what the released evaluation did, where that changes numbers."""
    prompt: str | None = None
    """Another prompt than the published one, a name of `tokens.task_prompts.PROMPTS`."""
    inception: Path | None = None
    """TorchScript weights of Inception, for FID and KID."""
    clip: str | None = None
    """A CLIP of transformers, a folder or a hub id, for agreement of texts and images."""
    judge: Judge | None = None
    """Who judges interleaved answers."""
    judge_memory: Path = Path("verdicts.jsonl")
    """Where its verdicts are kept."""
    source: dict[str, Any] = field(default_factory=dict)
    """Further settings of the task's source, e.g. `images` or `split`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task."""

    read_gold: Callable[[Path], list[Document]]
    """All documents of a data folder, with their targets."""
    score: Callable[[Sequence[Document], Sequence[Document]], dict[str, float]]
    """(predictions, gold) -> metrics. Never sees a model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings of the published evaluation; flags of the command outrank them."""
    export: Callable[[Sequence[Document], Sequence[Document], Path], None] | None = None
    """(predictions, gold, folder): writes what the benchmark's own evaluator reads."""
    notes: tuple[str, ...] = ()
    """Where it deviates from the correct way, for the page."""
