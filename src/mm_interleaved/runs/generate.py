"""Documents in, a finished run folder out: the main job, shared by `generate`, `replay` and `evaluate`."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.devices import torch_device
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import open_image
from mm_interleaved.errors import NumericalError, UsageError
from mm_interleaved.generation.defaults import generation_defaults
from mm_interleaved.generation.events import Event, Failed, Finished
from mm_interleaved.generation.loading import AS_IT_IS, Acceleration, load_generator
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.model_files.config import read_config
from mm_interleaved.model_files.hashing import hash_model
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.runs.folder import RunFolder, RunIdentity, open_run
from mm_interleaved.runs.manifest import batch_size_of
from mm_interleaved.runs.page import render_page, title_of
from mm_interleaved.runs.provenance import package_versions
from mm_interleaved.runs.redo import OnEvent, Redo, redo_documents

if TYPE_CHECKING:
    import torch

    from mm_interleaved.generation import InterleavedGenerator

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
class ModelChoice:
    """Which model, and how it computes."""

    name: str = "storyworld"
    device: str = "auto"
    dtype: str = "auto"
    acceleration: Acceleration = AS_IT_IS


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
    batch_size: int | None = None
    """Documents continued at once; None: as many as the run in the folder, else `default_batch_size`."""


MOST_AT_ONCE, MEMORY_A_DOCUMENT = 16, 4 * 2**30
"""Of documents on a GPU, and bytes of its memory for each: in the published size one remembers about 2 GB of
a full context, and takes 1 GB while an image of 512 pixels is denoised.
"""


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
    request: RunRequest, on_event: OnEvent, *, load: Callable[..., InterleavedGenerator] = load_generator
) -> RunOutcome:
    """Continue every document of a request that its folder does not hold yet, and write the page.

    Documents are continued in batches, each written as soon as it is finished. A document that cannot be read
    or does not fit the model fails alone; anything else that goes wrong stops the run, which the same request
    takes up again.

    Args:
        on_event: called with every event of the generator and the document it belongs to, and once more with
            "finished" or "failed".
        load: makes the generator from a model's folder; called only if there is something to do.
    """
    folder = find_model(request.model.name)
    defaults = generation_defaults(read_config(folder))
    run_settings = GenerationSettings.combine(defaults, request.flags)
    settings = {
        document.id: settings_for(document, defaults, request.flags) for document in request.documents
    }
    with open_run(
        request.output,
        request.documents,
        _identity(request, folder, run_settings),
        lambda: _facts(request, settings),
        new_run=request.new_run,
        retry_errors=request.retry_errors,
    ) as run:
        pending = run.pending()
        _check_batch_size(run, request.batch_size)
        if pending:
            _warn_of_differences(run, request.model.device)
            generator = load(
                folder,
                device=request.model.device,
                dtype=request.model.dtype,
                acceleration=request.model.acceleration,
            )
            if request.redo is not None:
                redo_documents(run, generator, request.redo, settings, on_event)
            else:
                generator.warn_of_unknown_words(pending)
                _continue_all(run, generator, request.documents, settings, on_event)
        run.close(lambda records: _page(records, run.path, request.model.name, run_settings.seed))
        return _outcome(request, run, pending, settings.values())


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
    )


def _facts(request: RunRequest, settings: Mapping[str, GenerationSettings]) -> dict[str, Any]:
    """What the manifest of a new run says beside its identity."""
    seeds = {key: chosen.seed for key, chosen in settings.items()}
    batch_size = request.batch_size or default_batch_size(torch_device(request.model.device))
    return {"seeds": seeds, "batch_size": batch_size, **machine_facts(request.model.device)}


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


def continue_in_batches(
    generator: InterleavedGenerator,
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


def _check_batch_size(run: RunFolder, wanted: int | None):
    """As many documents at once as when the folder's run began, since the last bits depend on them."""
    found = batch_size_of(run.manifest)
    if wanted not in (None, found):
        raise UsageError(
            f"{run.path}: holds another run (batch_size was {found}, is now {wanted}); choose another folder "
            "with -o or use --new-run",
            field="batch_size",
        )


def _continue_all(
    run: RunFolder,
    generator: InterleavedGenerator,
    documents: Sequence[Document],
    settings: Mapping[str, GenerationSettings],
    on_event: OnEvent,
):
    batch_size = batch_size_of(run.manifest)
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        _continue(run, generator, batch, [settings[document.id] for document in batch], on_event)


def _continue(
    run: RunFolder,
    generator: InterleavedGenerator,
    batch: Sequence[Document],
    settings: Sequence[GenerationSettings],
    on_event: OnEvent,
):
    """Continue what is missing of a batch.

    Those that are finished already are computed once more beside it and not written: then each document is
    continued beside the same others, whether the run was stopped meanwhile or not, and comes out the same to
    the bit.
    """
    if all(document.id in run.finished for document in batch):
        return
    missing = {place for place, document in enumerate(batch) if document.id not in run.finished}
    for place, event in continue_in_batches(generator, batch, settings, len(batch)):
        if place not in missing:
            continue
        on_event(batch[place], event)
        if isinstance(event, Finished):
            run.commit(event.document)
            on_event(batch[place], "finished")
        elif isinstance(event, Failed):
            run.commit_error(batch[place], event.error)
            on_event(batch[place], "failed")


def _page(records: Sequence[Mapping[str, Any]], folder: Path, model: str, seed: int) -> bytes:
    made_by = f"generated by {Path(model).name} · seed {seed}"
    return render_page(
        records, lambda path: open_image(folder / path), title=title_of(records), made_by=made_by
    )
