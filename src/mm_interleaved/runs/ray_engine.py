"""The engine of a cluster: the batches of a run on Ray Data, locally or on many machines.

The driver (this process) holds the run's folder and is the only one that writes to it. Workers put what they
have made into `.ray-<hash>/outcomes` beside it; Ray remembers in `.ray-<hash>/checkpoint` which batches are
there, so that a driver that was killed does not have them made again. The driver commits each outcome to the
run's folder as it arrives, and removes `.ray-<hash>` in the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import NumericalError, UsageError, escape
from mm_interleaved.files import storage_errors
from mm_interleaved.runs.batch_rows import BatchOutcome, batch_id, outcome_of_row
from mm_interleaved.runs.engine import Batch, Work

if TYPE_CHECKING:
    from ray.data import Dataset

_FOLDER = ".ray-"
_SECONDS_BETWEEN_LOOKS = 0.2
_READERS, _WRITERS = 2, 2
"""Tasks on the driver's node that read and write files, beside its actors: they take no CPU of the cluster's
account, and would each be a process if nothing limited them."""
_ROUNDS = 2
"""The second makes what the first could not: outcomes that were damaged, or removed by hand."""
_MISSING = "the engine ray needs Ray, which is not installed: pip install 'mm-interleaved[ray]'"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEngine:
    """Continues the documents of a run by actors on a Ray cluster, each with the model in its memory."""

    address: str | None = None
    """Of a running cluster ("auto": the one of this machine); None: one is started here, and ended."""
    num_actors: int | None = None
    """Default: as many as the cluster has room for."""
    gpus_per_actor: float | None = None
    """Default: 1 where the cluster has GPUs and the run's device is one, else 0."""

    def __post_init__(self):
        if self.address is not None and self.address.startswith("ray://"):
            raise UsageError(
                f"address: found {escape(self.address)!r}, a Ray client, which reaches no files of this "
                "machine; run the command on a machine of the cluster, with --address auto",
                field="address",
            )
        if self.num_actors is not None and self.num_actors < 1:
            raise UsageError(f"num_actors: found {self.num_actors}, expected 1 or more", field="num_actors")
        gpus = self.gpus_per_actor
        if gpus is not None and not 0 <= gpus < math.inf:
            raise UsageError(f"gpus_per_actor: found {gpus}, expected 0 or more", field="gpus_per_actor")

    def __call__(self, work: Work) -> None:
        """See `engine.Engine`.

        Raises:
            UsageError: Ray is not installed, its cluster is not there or too small.
            NumericalError: when all others are done, if what the model computed for one was not finite.
            MMInterleavedError: what is wrong for all documents, as without Ray.
        """
        if find_spec("ray") is None or find_spec("ray.data") is None:
            raise UsageError(_MISSING, field="engine")
        take = _Taking(work, work.run.path / f"{_FOLDER}{_digest(work.run.manifest)}")
        take.remove_others()
        if work.is_retry:
            # What failed in a run that was killed is to be made again as well.
            take.all_there(leaving_errors=True)
            take.remove()
        with _cluster(self.address):
            actors = self._actors(work)
            for _ in range(_ROUNDS):
                batches = work.unfinished()
                if not batches:
                    break
                _make(work, batches, take, actors)
                take.remove()
                take.raise_numerical()
        left = work.unfinished()
        if left:
            raise AssertionError(f"Ray made no outcome of batch {left[0].start}")

    def _actors(self, work: Work) -> _Actors:
        """How many actors, and what each takes of the cluster. Raises UsageError where none fits."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most_cpus, most_gpus = (max(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        gpus = self.gpus_per_actor
        if gpus is None:
            gpus = 1 if most_gpus >= 1 and work.model.device.split(":")[0] in ("auto", "cuda") else 0
        if gpus > most_gpus:
            raise UsageError(
                f"gpus_per_actor: found {gpus:g}, expected at most {most_gpus:g}, which is what the largest "
                "node of the cluster has",
                field="gpus_per_actor",
            )
        if most_cpus < 1:
            raise UsageError("address: no node of the cluster has a CPU for an actor", field="address")
        cpus = 1 if gpus else min(work.run.manifest["threads"], int(most_cpus))
        room = sum(
            int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) / gpus if gpus else math.inf))
            for node in nodes
        )
        number = self.num_actors or max(1, room)
        if number > room:
            logger.warning(
                "%d actors are wanted and the cluster has room for %d (each takes %d CPUs and %g GPUs); "
                "the others wait until it has grown",
                number, room, cpus, gpus,
            )  # fmt: skip
        return _Actors(number, cpus, gpus)


@dataclass(frozen=True, slots=True)
class _Actors:
    number: int
    cpus: int
    gpus: float


@dataclass(slots=True)
class _Taking:
    """Takes what workers have made into the run's folder, each document once."""

    work: Work
    folder: Path
    numerical: NumericalError | None = None
    said: set[str] = field(default_factory=set)
    """Warnings of workers, each of which is passed on once."""

    @property
    def outcomes(self) -> Path:
        return self.folder / "outcomes"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def all_there(self, *, leaving_errors: bool = False):
        """Commit every outcome that is there, and remove its file."""
        from mm_interleaved.runs.ray_dataset import read_outcome, written_outcomes

        batches = {batch_id(batch): batch for batch in self.work.batches}
        for path in written_outcomes(self.outcomes):
            batch = batches.get(path.stem)
            try:
                found = None if batch is None else outcome_of_row(batch.documents, read_outcome(path))
            except (OSError, ValueError, LookupError, TypeError) as error:
                logger.warning("%s: damaged (%s), its documents are made again", path, escape(str(error)))
                found = None
            if batch is not None and found is not None:
                self._commit(batch, found, leaving_errors)
            with storage_errors(path):
                path.unlink()

    def _commit(self, batch: Batch, found: BatchOutcome, leaving_errors: bool):
        for warning in found.warnings:
            if warning not in self.said:
                self.said.add(warning)
                logger.warning("%s", warning)
        if found.error is not None:
            # Of all documents: nothing is written of them, and the next run tries again.
            self.remove()
            raise found.error
        for document, outcome in zip(batch.documents, found.outcomes, strict=True):
            if not self.work.is_missing(document):
                continue
            if isinstance(outcome, NumericalError):
                self.numerical = self.numerical or outcome
            elif not (leaving_errors and isinstance(outcome, Exception)):
                self.work.commit(document, outcome)

    def raise_numerical(self):
        """What the model computed is wrong, whichever document met it: the run ends with it."""
        if self.numerical is not None:
            raise self.numerical

    def remove(self):
        """What Ray keeps of the run, all at once: half of it would be taken for the whole."""
        _remove(self.folder)

    def remove_others(self):
        """What other runs, since put aside, have left in the folder."""
        for path in self.work.run.path.glob(f"{_FOLDER}*"):
            if path != self.folder:
                _remove(path)


def _make(work: Work, batches: Sequence[Batch], take: _Taking, actors: _Actors):
    """One pass of Ray over batches; outcomes are taken up while it goes on."""
    errors: list[BaseException] = []

    def write():
        from mm_interleaved.runs.ray_dataset import OutcomeSink

        try:
            dataset.write_datasink(
                OutcomeSink(take.outcomes), ray_remote_args={"num_cpus": 0}, concurrency=_WRITERS
            )
        except BaseException as error:
            errors.append(error)

    with warnings.catch_warnings():
        # Of sinks whose files could be written twice; ours are named by their batch.
        warnings.filterwarnings("ignore", "Checkpointing with non-file datasink")
        # Ray warns of its own old names whenever it copies its own context.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.context")
        dataset = _dataset(work, batches, take, actors)
        # Beside the main thread, which a signal interrupts.
        writer = Thread(target=write, daemon=True)
        writer.start()
        while writer.is_alive():
            writer.join(_SECONDS_BETWEEN_LOOKS)
            take.all_there()
    take.all_there()
    if errors:
        raise errors[0]


def _dataset(work: Work, batches: Sequence[Batch], take: _Taking, actors: _Actors) -> Dataset:
    import ray.data
    from pyarrow.fs import LocalFileSystem
    from ray.data.checkpoint import CheckpointConfig

    from mm_interleaved.runs.ray_dataset import ID, BatchSource, ContinueBatches, DriverCheckpoints

    # What it says on the terminal stands in its log file as well.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.checkpoint_config = CheckpointConfig(
        ID,
        str(take.checkpoint.absolute()),
        override_filesystem=LocalFileSystem(),
        checkpoint_manager_cls=DriverCheckpoints,
        delete_checkpoint_on_success=False,
    )
    arguments = {
        # Each node has a memory of its own to plan for.
        "model": replace(work.model, plan=None),
        "weights": work.weights,
        "threads": work.run.manifest["threads"],
        "load": work.load,
    }
    with ray.data.DataContext.current(context):
        source = ray.data.read_datasource(BatchSource(batches), num_cpus=0, override_num_blocks=len(batches))
        return source.map_batches(
            ContinueBatches,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(actors.number, len(batches))),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            fn_constructor_kwargs=arguments,
        )


@contextmanager
def _cluster(address: str | None) -> Generator[None, None, None]:
    """Connected to a cluster: one that runs, or one that is started here and ended afterwards.

    Raises:
        UsageError: there is none at the address.
    """
    # Nothing is sent anywhere, and what Ray's processes have to say goes to its own log files.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"address {escape(str(address))!r}: no Ray cluster can be reached ({escape(str(error))})",
            field="address",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _digest(manifest: Mapping[str, Any]) -> str:
    """What makes two runs the same, with all that their bits depend on, in a few letters."""
    record = {key: value for key, value in manifest.items() if key != "outputs"}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _remove(folder: Path):
    """Renamed first, so that a kill leaves all of it or nothing that is looked at."""
    if not os.path.lexists(folder):
        return
    aside = folder.with_name(f".removed{folder.name}")
    with storage_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
