"""Documents in, a finished run folder out: the main job, shared by `generate`, `replay` and `evaluate`."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import torch_device
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import open_image
from mm_interleaved.errors import UsageError
from mm_interleaved.generation.defaults import generation_defaults
from mm_interleaved.generation.events import Event, Finished
from mm_interleaved.generation.fitting import FittingGenerator, explain, plans_for
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.model_files.config import read_config
from mm_interleaved.model_files.hashing import hash_model
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.device_memory import room_of
from mm_interleaved.models.memory_plan import MemoryPlan
from mm_interleaved.runs.engine import (
    Answer,
    Batch,
    Engine,
    ModelChoice,
    OnEvent,
    Work,
    continue_here,
    continue_in_batches,
    default_batch_size,
)
from mm_interleaved.runs.folder import RunFolder, RunIdentity, open_run
from mm_interleaved.runs.manifest import batch_size_of
from mm_interleaved.runs.page import render_page, title_of
from mm_interleaved.runs.provenance import package_versions
from mm_interleaved.runs.redo import Redo, redo_documents
from mm_interleaved.runs.shares import open_share, take_over_shares

if TYPE_CHECKING:
    import torch

    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.runs.ranks import Ranks

_PACKAGES = (
    "mm-interleaved",
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A run that is wanted."""

    documents: Sequence[Document]
    """Read and checked, ids distinct."""
    output: Path
    model: ModelChoice = field(default_factory=ModelChoice)
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings of the command line; they outrank the documents' own."""
    new_run: bool = False
    retry_errors: bool = False
    redo: Redo | None = None
    """One part of one document to be made again, instead of continuing all; the others are kept."""
    answering: Mapping[str, Any] = field(default_factory=dict)
    """How documents are answered, where not just by being continued; makes it another run."""
    batch_size: int | None = None
    """Documents continued at once; None: as many as the run in the folder, else `default_batch_size`."""
    engine: Engine = continue_here
    """What continues them; no part of what the run is."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of it."""

    output: Path
    num_documents: int
    num_failed: int
    num_already_finished: int
    records: Sequence[Mapping[str, Any]]
    made: Sequence[Mapping[str, Any]]
    """Those of the records that this request made; the others were finished before."""
    is_lossy: bool = False
    """Whether images were generated with something left out, or with an adapter."""


def run_documents(
    request: RunRequest,
    on_event: OnEvent,
    *,
    load: Callable[..., InterleavedGenerator] = load_generator,
    answer: Answer | None = None,
    ranks: Ranks | None = None,
) -> RunOutcome:
    """Continue every document of a request that its folder does not hold yet, and write the page.

    Documents are continued in batches, each written as soon as it is finished. A document that cannot be read
    or does not fit the model fails alone; anything else that goes wrong stops the run, which the same request
    takes up again. Several ranks take turns with the batches, so that each document stands beside the same
    others, and comes out the same, however many there are; the first one holds the folder.

    Args:
        on_event: called with every event of the generator and the document it belongs to, and once more with
            "finished" or "failed".
        load: makes the generator from a model's folder; called only if there is something to do.
        answer: what continues a batch; default: `continue_in_batches`.
        ranks: the processes that do the run together; all of them call this. None: this one alone.

    Returns:
        What became of it; on another rank than the first, of its own share.
    """
    folder = find_model(request.model.name)
    defaults = generation_defaults(read_config(folder))
    run_settings = GenerationSettings.combine(defaults, request.flags)
    settings = {
        document.id: settings_for(document, defaults, request.flags) for document in request.documents
    }
    identity = _identity(request, folder, run_settings)
    with ExitStack() as stack:
        whole: RunFolder | None = None

        def begin() -> tuple[int, frozenset[str]]:
            nonlocal whole
            whole = stack.enter_context(_open(request, identity, lambda: _facts(request, folder, settings)))
            return _batch_size(whole, request.batch_size), frozenset(whole.finished)

        # 1. What is still to be done, and this rank's share of it.
        batch_size, finished = begin() if ranks is None else ranks.from_first(begin)
        batches = unfinished_batches(request.documents, batch_size, finished)
        own = batches if ranks is None else batches[ranks.rank :: ranks.size]
        pending = [document for _, batch in own for document in batch if document.id not in finished]

        # 2. It is done.
        if whole is None:
            assert ranks is not None, "whoever is alone holds the folder"
            part = open_share(request.output, ranks.rank, request.documents)
        else:
            part = nullcontext(whole)
            if batches:
                _warn_of_differences(whole, request.model.device)
        with part as run:
            if own:
                work = Work(
                    run=run,
                    batches=_with_settings(own, settings),
                    finished=finished,
                    to_be_read=() if whole is None else whole.pending(),
                    model=_planned(request.model, run, ranks),
                    weights=identity.weights,
                    folder=folder,
                    load=load,
                    answer=answer or continue_in_batches,
                    on_event=on_event,
                    is_retry=request.retry_errors,
                )
                engine = request.engine if request.redo is None else partial(_redo_here, request.redo)
                engine(work)
        if ranks is not None:
            ranks.gather("done")
        if whole is None:
            return _outcome(request, run, pending, settings.values())

        # 3. All shares are put together.
        take_over_shares(whole)
        whole.close(lambda records: _page(records, run.path, request.model.name, run_settings.seed))
        made = [document for document in request.documents if document.id not in finished]
        return _outcome(request, whole, made, settings.values())


def unfinished_batches(
    documents: Sequence[Document], batch_size: int, finished: Collection[str]
) -> list[tuple[int, Sequence[Document]]]:
    """The batches of a run, always the same, that still lack a document; and where each begins."""
    batches = (
        (start, documents[start : start + batch_size]) for start in range(0, len(documents), batch_size)
    )
    return [
        (start, batch) for start, batch in batches if any(document.id not in finished for document in batch)
    ]


@contextmanager
def _open(
    request: RunRequest, identity: RunIdentity, facts: Callable[[], Mapping[str, Any]]
) -> Generator[RunFolder, None, None]:
    """The run's folder, with what earlier ranks left."""
    with open_run(
        request.output,
        request.documents,
        identity,
        facts,
        new_run=request.new_run,
        retry_errors=request.retry_errors,
    ) as run:
        take_over_shares(run, retry_errors=request.retry_errors)
        yield run


def _identity(request: RunRequest, folder: Path, settings: GenerationSettings) -> RunIdentity:
    return RunIdentity(
        model=request.model.name,
        weights=hash_model(folder),
        settings=settings.to_dict(),
        flags=request.flags,
        device=request.model.device,
        dtype=request.model.dtype,
        acceleration=request.model.acceleration.record(),
        redo=None if request.redo is None else request.redo.record(),
        answering=request.answering,
        memory=request.model.memory,
    )


def _facts(request: RunRequest, folder: Path, settings: Mapping[str, GenerationSettings]) -> dict[str, Any]:
    """What the manifest of a new run says beside its identity."""
    seeds = {key: chosen.seed for key, chosen in settings.items()}
    device = torch_device(request.model.device)
    batch_size = request.batch_size or default_batch_size(device)
    plan: dict[str, Any] = {}
    if request.model.memory is not None:
        chosen = request.model.plan or _chosen_plan(request.model, folder, device, batch_size)
        plan = {"memory_plan": chosen.record()}
        batch_size = request.batch_size or chosen.batch_size
    return {"seeds": seeds, "batch_size": batch_size, **plan, **machine_facts(request.model.device)}


def _chosen_plan(model: ModelChoice, folder: Path, device: torch.device, most_at_once: int) -> MemoryPlan:
    """The first plan for a model here; says what it is, and why."""
    assert model.memory is not None
    room = room_of(device)
    plan, *_ = plans_for(
        folder,
        model.memory,
        device=model.device,
        dtype=model.dtype,
        quantization=model.acceleration.quantization,
        most_at_once=most_at_once,
        room=room,
    )
    logger.warning("%s", explain(plan, model.memory, room))
    return plan


def _planned(model: ModelChoice, run: RunFolder, ranks: Ranks | None) -> ModelChoice:
    """On this rank's device; with the plan with which the run began, or to which it had to go over: the last
    bits depend on it.
    """
    if ranks is not None:
        model = replace(model, device=str(ranks.device))
    if model.memory is None:
        return model
    return replace(model, plan=MemoryPlan.of_record(run.manifest["memory_plan"]))


def _warn_of_differences(run: RunFolder, device: str):
    for difference in facts_that_differ(run.manifest, machine_facts(device)):
        logger.warning("%s: %s; what is still to be made may differ in its last bits", run.path, difference)


def _outcome(
    request: RunRequest,
    run: RunFolder,
    pending: Sequence[Document],
    settings: Iterable[GenerationSettings],
) -> RunOutcome:
    return RunOutcome(
        output=request.output,
        num_documents=len(request.documents),
        num_failed=len(run.failed),
        num_already_finished=len(request.documents) - len(pending),
        records=list(run.finished.values()),
        made=[run.finished[document.id] for document in pending],
        is_lossy=request.model.acceleration.adapter is not None
        or any(chosen.is_lossy for chosen in settings),
    )


def complete(
    generator: InterleavedGenerator,
    document: Document,
    settings: GenerationSettings,
    on_event: Callable[[Event], None],
) -> Document:
    """The completed document; `on_event` is called with its events on the way."""
    for event in generator.stream(document, settings=settings):
        on_event(event)
        if isinstance(event, Finished):
            return event.document
    raise AssertionError("a stream ends with Finished")


def machine_facts(device: str) -> dict[str, Any]:
    """What a bit-for-bit repetition depends on beside the model and the settings."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "machine": {
            "device": str(torch_device(device)),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": package_versions(_PACKAGES),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def facts_that_differ(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a run began, of all that its bits may depend on: one phrase each."""
    then, now = ({"threads": f["threads"], **f["machine"], **f["versions"]} for f in (manifest, facts))
    return [f"{key} was {then[key]}, is {now.get(key)}" for key in then if then[key] != now.get(key)]


def _batch_size(run: RunFolder, wanted: int | None) -> int:
    """As many documents at once as when the folder's run began, since the last bits depend on them."""
    found = batch_size_of(run.manifest)
    if wanted not in (None, found):
        raise UsageError(
            f"{run.path}: holds another run (batch_size was {found}, is now {wanted}); choose another folder "
            "with -o or use --new-run",
            field="batch_size",
        )
    return found


def _redo_here(redo: Redo, work: Work):
    """The engine that makes one part again."""
    generator = work.generator()
    settings = {
        document.id: each
        for batch in work.batches
        for document, each in zip(batch.documents, batch.settings, strict=True)
    }
    if isinstance(generator, FittingGenerator):
        generator = generator.generator
    redo_documents(work.run, generator, redo, settings, work.on_event)


def _with_settings(
    batches: Sequence[tuple[int, Sequence[Document]]], settings: Mapping[str, GenerationSettings]
) -> list[Batch]:
    return [Batch(start, batch, [settings[each.id] for each in batch]) for start, batch in batches]


def _page(records: Sequence[Mapping[str, Any]], folder: Path, model: str, seed: int) -> bytes:
    made_by = f"generated by {Path(model).name} · seed {seed}"
    return render_page(
        records, lambda path: open_image(folder / path), title=title_of(records), made_by=made_by
    )
