"""What an evaluation needs to know of a task: its documents with a hole, how they are answered and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.answering import Ranking
from mm_interleaved.evaluation.judges.judge import Judge
from mm_interleaved.evaluation.metrics.confusion import Confusion

if TYPE_CHECKING:
    from mm_interleaved.evaluation.readers import Readers

Cases = Mapping[str, Sequence[float]]
"""By metric: what one document adds to it. The metric is the mean over the cases of all documents."""
Score = Callable[[Sequence[Document], Sequence[Document]], dict[str, float]]


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
    segmenter: str | None = None
    """A semantic segmentation of transformers, a folder or a hub id: mean IoU of images made from maps."""
    judge: Judge | None = None
    """Who judges interleaved answers."""
    judge_memory: Path = Path("verdicts.jsonl")
    """Where its verdicts are kept."""
    source: dict[str, Any] = field(default_factory=dict)
    """Further settings of the task's source, e.g. `images` or `split`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRankers:
    """A ranker of candidate images, made where it is needed."""

    name: str
    """Makes two runs differ."""
    make: Callable[[], Callable[[str, Sequence[PILImage.Image]], Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task."""

    name: str = ""
    """By which `make_task` makes it again."""
    options: TaskOptions = field(default_factory=TaskOptions)
    """With which it was made."""
    read_gold: Callable[[Path], list[Document]]
    """All documents of a data folder, with their targets."""
    score: Score
    """(predictions, gold) -> metrics. Never sees a model."""
    cases: Callable[[Document | None, Document], Cases] | None = None
    """(prediction, gold document) -> its cases, of those metrics that are means over cases. None where all
    metrics are of the set as a whole."""
    confusions: Callable[[Sequence[Document], Sequence[Document]], list[Confusion]] | None = None
    """(predictions, gold) -> what was read in place of what, where the truth of each attribute is known."""
    ranking: Ranking = field(default_factory=Ranking)
    """How documents with candidate answers are answered."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings of the published evaluation; flags of the command outrank them."""
    image_ranker: ImageRankers | None = None
    """Who chooses among the candidates of an image; None: the model itself."""
    readers: Readers | None = None
    """Who looks at the images of answers, as they are made, for scores that need it."""
    export: Callable[[Sequence[Document], Sequence[Document], Path], None] | None = None
    """(predictions, gold, folder): writes what the benchmark's own evaluator reads."""
    notes: tuple[str, ...] = ()
    """Where it deviates from the correct way, for the page."""


def each_alone(score: Score, *metrics: str) -> Callable[[Document | None, Document], Cases]:
    """`Task.cases` of a score that is a mean over documents, each of which counts once: its value for one.

    Args:
        metrics: the last words of the names of those for which this holds; all where none is named.
    """

    def cases(prediction: Document | None, document: Document) -> Cases:
        found = score([] if prediction is None else [prediction], [document])
        return {
            name: [value]
            for name, value in found.items()
            if not metrics or name.rpartition(".")[2] in metrics
        }

    return cases
