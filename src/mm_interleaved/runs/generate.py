"""Documents in, a finished run folder out: the main job, shared by `generate`, `replay` and `evaluate`."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
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

Answer = Callable[
    ["InterleavedGenerator", Sequence[Document], Sequence[GenerationSettings], int],
    Iterator[tuple[int, Event]],
]
"""What continues documents, as `continue_in_batches` does."""


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
    answering: Mapping[str, Any] = field(default_factory=dict)
    """How documents are answered, where not just by being continued; makes it another run."""
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
            whole = stack.enter_context(_open(request, identity, lambda: _facts(request, settings)))
            return _batch_size(whole, request.batch_size), frozenset(whole.finished)

        # 1. What is still to be done, and this rank's share of it.
        batch_size, finished = begin() if ranks is None else ranks.from_first(begin)
        batches = unfinished_batches(request.documents, batch_size, finished)
        own = batches if ranks is None else batches[ranks.rank :: ranks.size]
        pending = [document for batch in own for document in batch if document.id not in finished]

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
                generator = _load(request.model, folder, load, ranks)
                if request.redo is not None:
                    redo_documents(run, generator, request.redo, settings, on_event)
                else:
                    if whole is not None:
                        generator.warn_of_unknown_words(whole.pending())
                    continued = partial(answer or continue_in_batches, generator)
                    _continue(run, own, settings, finished, continued, on_event)
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
) -> list[Sequence[Document]]:
    """The batches of a run, always the same, that still lack a document."""
    batches = (documents[start : start + batch_size] for start in range(0, len(documents), batch_size))
    return [batch for batch in batches if any(document.id not in finished for document in batch)]


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


def _load(
    model: ModelChoice, folder: Path, load: Callable[..., InterleavedGenerator], ranks: Ranks | None
) -> InterleavedGenerator:
    device = model.device if ranks is None else str(ranks.device)
    return load(folder, device=device, dtype=model.dtype, acceleration=model.acceleration)


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


def _continue(
    run: RunFolder,
    batches: Sequence[Sequence[Document]],
    settings: Mapping[str, GenerationSettings],
    finished: Collection[str],
    continued: Callable[..., Iterator[tuple[int, Event]]],
    on_event: OnEvent,
):
    """Write what is missing of batches, while they are continued.

    Those that are finished already are computed once more beside it and not written: then each document is
    continued beside the same others, whether the run was stopped meanwhile or not, and comes out the same to
    the bit.
    """
    for batch in batches:
        for place, event in continued(batch, [settings[document.id] for document in batch], len(batch)):
            document = batch[place]
            if document.id in finished:
                continue
            on_event(document, event)
            if isinstance(event, Finished):
                run.commit(event.document)
                on_event(document, "finished")
            elif isinstance(event, Failed):
                run.commit_error(document, event.error)
                on_event(document, "failed")


def _page(records: Sequence[Mapping[str, Any]], folder: Path, model: str, seed: int) -> bytes:
    made_by = f"generated by {Path(model).name} · seed {seed}"
    return render_page(
        records, lambda path: open_image(folder / path), title=title_of(records), made_by=made_by
    )
