"""How the documents that a run misses are continued: by an engine. Here: the contract, and this process.

An engine is given `Work` and commits every document of it to the run's folder, as it is finished. Which
engine it was makes no difference to what is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import MMInterleavedError, NumericalError
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.fitting import FittingGenerator, plans_for
from mm_interleaved.generation.loading import AS_IT_IS, Acceleration
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.models.memory_plan import MemoryPlan
from mm_interleaved.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from mm_interleaved.generation import InterleavedGenerator

OnEvent = Callable[[Document, Event | str], None]
Answer = Callable[[Any, Sequence[Document], Sequence[GenerationSettings], int], Iterator[tuple[int, Event]]]
"""What continues documents by a generator, as `continue_in_batches` does."""

MOST_AT_ONCE, MEMORY_A_DOCUMENT = 16, 4 * 2**30
"""Of documents on a GPU, and bytes of its memory for each: in the published size one remembers about 2 GB of
a full context, and takes 1 GB while an image of 512 pixels is denoised.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Which model, and how it computes."""

    name: str = "storyworld"
    device: str = "auto"
    dtype: str = "auto"
    acceleration: Acceleration = AS_IT_IS
    memory: str | None = None
    """How it is made to fit, "auto" or "low" (see `generation.fitting`); None: it is taken as it is."""
    plan: MemoryPlan | None = None
    """What was chosen for `memory`."""

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any], name: str) -> ModelChoice:
        """That of a run once more.

        Args:
            name: where the model is now.

        Raises:
            ModelFileError: the files of its adapter have changed.
        """
        plan = manifest.get("memory_plan")
        return cls(
            name=name,
            device=manifest["device"],
            dtype=manifest["dtype"],
            acceleration=Acceleration.of_record(manifest.get("acceleration", {})),
            memory=manifest.get("memory"),
            plan=None if plan is None else MemoryPlan.of_record(plan),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents that are continued together, always the same ones: the last bits of each depend on it.

    Those that are finished already are computed once more beside the others and not written.
    """

    start: int
    """The place of the first among the run's documents."""
    documents: Sequence[Document]
    settings: Sequence[GenerationSettings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run misses, and what it is to be made with."""

    run: RunFolder
    """Where it is committed."""
    batches: Sequence[Batch]
    """Those of this process that lack a document."""
    finished: Collection[str]
    """Ids of the documents that were finished before, by whomever."""
    to_be_read: Sequence[Document]
    """Whose words are to be looked at, in this process."""
    model: ModelChoice
    weights: str
    """SHA-256 over the model's files."""
    folder: Path
    """Of the model."""
    load: Callable[..., InterleavedGenerator]
    """Makes the generator from the folder, `device`, `dtype` and `acceleration`."""
    answer: Answer
    """What continues a batch."""
    on_event: OnEvent
    is_retry: bool = False
    """Documents that failed before are to be made again."""

    def is_missing(self, document: Document) -> bool:
        """It has no record yet."""
        return document.id not in self.finished and document.id not in self.run.finished

    def unfinished(self) -> list[Batch]:
        """The batches of which a document is missing still."""
        return [batch for batch in self.batches if any(map(self.is_missing, batch.documents))]

    def generator(self) -> InterleavedGenerator | FittingGenerator:
        """The model, ready to continue documents."""
        return loaded(self.model, self.folder, self.load, self._changed)

    def _changed(self, plan: MemoryPlan):
        """A smaller plan is at work: where the run is taken up again, it begins with that."""
        record = plan.record()
        changes = [*self.run.manifest.get("memory_changes", ()), record]
        self.run.note(memory_plan=record, memory_changes=changes)

    def commit(self, document: Document, outcome: Document | MMInterleavedError):
        """Write what became of a document, and say so."""
        if isinstance(outcome, Document):
            self.run.commit(outcome)
        else:
            self.run.commit_error(document, outcome)
        self.on_event(document, "finished" if isinstance(outcome, Document) else "failed")


def loaded(
    model: ModelChoice,
    folder: Path,
    load: Callable[..., InterleavedGenerator],
    on_change: Callable[[MemoryPlan], object] = lambda plan: None,
) -> InterleavedGenerator | FittingGenerator:
    """A model as it was chosen, ready to continue documents; see `load_generator`.

    Args:
        on_change: called with each plan that takes another's place, as memory ran out.
    """
    choice = {"device": model.device, "dtype": model.dtype, "acceleration": model.acceleration}
    if model.memory is None:
        return load(folder, **choice)
    plans = plans_for(
        folder,
        model.memory,
        device=model.device,
        dtype=model.dtype,
        quantization=model.acceleration.quantization,
    )
    if model.plan is not None:
        # The run's own comes first, whatever is free by now, and what is smaller behind it.
        plans = [model.plan, *(plan for plan in plans if plan.held < model.plan.held)]
    return FittingGenerator(lambda plan: load(folder, **choice, plan=plan), plans, on_change)


Engine: TypeAlias = Callable[[Work], None]


def continue_here(work: Work):
    """The engine of one process: one batch after the other."""
    generator = work.generator()
    generator.warn_of_unknown_words(work.to_be_read)
    for batch in work.batches:
        missing = {place for place, each in enumerate(batch.documents) if work.is_missing(each)}
        for place, event in work.answer(generator, batch.documents, batch.settings, len(batch.documents)):
            if place not in missing:
                continue
            document = batch.documents[place]
            work.on_event(document, event)
            if isinstance(event, Finished):
                work.commit(document, event.document)
            elif isinstance(event, Failed):
                work.commit(document, event.error)


def continue_in_batches(
    generator: InterleavedGenerator | FittingGenerator,
    documents: Sequence[Document],
    settings: Sequence[GenerationSettings],
    batch_size: int | None = None,
) -> Iterator[tuple[int, Event]]:
    """The events of each document, by its place: `batch_size` documents at once, then the next.

    Args:
        settings: of each.
        batch_size: default: see `default_batch_size`.

    Raises:
        NumericalError: when the others of its batch are done.
    """
    batch_size = batch_size or default_batch_size(generator.model.device)
    for start in range(0, len(documents), batch_size):
        batch = slice(start, start + batch_size)
        numerical: list[NumericalError] = []
        for place, event in generator.stream_batch(documents[batch], settings=settings[batch]):
            match event:
                case Failed(error=NumericalError() as error):
                    numerical.append(error)
                case _:
                    yield start + place, event
        if numerical:
            raise numerical[0]


def default_batch_size(device: torch.device) -> int:
    """Documents to be continued at once on a device.

    Eight on a CPU, where one core makes eight captions of the shipped model in a quarter of the time that
    they take one by one, and eight stories of two images in half of it (2026-11, `python -m benchmarks
    batch`). On a GPU, which reads its weights once for all of them, as many as its memory holds of the
    published size.
    """
    import torch

    if device.type != "cuda":
        return 8
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST_AT_ONCE, memory // MEMORY_A_DOCUMENT))
