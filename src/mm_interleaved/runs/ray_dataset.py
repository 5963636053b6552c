"""The batches of a run as a Ray data set: where rows come from, who continues them, where they are put.

    BatchSource (driver's node) -> ContinueBatches (actors, anywhere) -> OutcomeSink (driver's node)

Files are read and written on the driver's node alone, so that the cluster needs no disk in common; rows
travel through Ray. Imported by `ray_engine` alone, when Ray is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import Datasink, Datasource
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import IdColumnCheckpointManager
from ray.data.datasource import ReadTask

from mm_interleaved.documents.document import Document
from mm_interleaved.errors import MMInterleavedError, ModelFileError
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation.events import Failed, Finished
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.hashing import hash_model
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.runs.batch_rows import (
    BatchOutcome,
    Outcome,
    Row,
    batch_of_row,
    row_of_batch,
    row_of_outcome,
)
from mm_interleaved.runs.engine import Batch, ModelChoice, loaded

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.generation.fitting import FittingGenerator

ID = "id"
_SCHEMA = pa.schema([(ID, pa.string()), ("content", pa.string()), ("images", pa.list_(pa.binary()))])
_SUFFIX = ".parquet"


def table_of(row: Row) -> pa.Table:
    """A row as the table that Ray moves."""
    return pa.Table.from_pylist([row], schema=_SCHEMA)


# Ray is an extra: without it its classes are unknown to the type checker.
class BatchSource(Datasource):  # pyright: ignore[reportUntypedBaseClass]
    """One row a batch. Image files are read when the row is wanted, on the driver's node."""

    def __init__(self, batches: Sequence[Batch]):
        super().__init__()
        self.batches = batches

    def get_name(self) -> str:
        return "Batches"

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task a batch, so that a batch is what is done, or lost, as a whole."""
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_reader(batch), metadata) for batch in self.batches]


def _reader(batch: Batch) -> Callable[[], list[pa.Table]]:
    return lambda: [table_of(row_of_batch(batch))]


class OutcomeSink(Datasink[None]):  # pyright: ignore[reportUntypedBaseClass]
    """Each row to a file of its own, whole or not at all, named by its batch: written twice, it is one."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def supports_distributed_writes(self) -> bool:
        return False

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        make_folder(self.folder)
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            for index in range(table.num_rows):
                buffer = pa.BufferOutputStream()
                pq.write_table(table.slice(index, 1), buffer)
                name = table[ID][index].as_py() + _SUFFIX
                write_file(self.folder / name, buffer.getvalue().to_pybytes())


class DriverCheckpoints(IdColumnCheckpointManager):  # pyright: ignore[reportUntypedBaseClass]
    """What Ray's checkpoint says is done, read by the driver, on whose node its files are."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[Any, int]:
        """A reference to the sorted ids of all batches that are written, and its bytes."""
        files = sorted(Path(self.checkpoint_path_unwrapped).glob(f"*{_SUFFIX}"))
        ids = sorted(name for path in files for name in _checkpointed(path))
        if not ids:
            return None, 0
        return ray.put(np.array(ids, dtype=object)), sum(map(len, ids))


def _checkpointed(path: Path) -> list[str]:
    """The ids in a file of the checkpoint; none in one that a kill cut short: they are made again."""
    try:
        return pq.read_table(path, columns=[ID])[ID].to_pylist()
    except (OSError, ValueError, LookupError):
        return []


def written_outcomes(folder: Path) -> list[Path]:
    """The files that an `OutcomeSink` has written so far, in the order of their batches."""
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith("."))


def read_outcome(path: Path) -> Row:
    """The row of such a file. Raises OSError, ValueError or LookupError where it is damaged."""
    [row] = pq.read_table(path, schema=_SCHEMA).to_pylist()
    return row


class ContinueBatches:
    """What an actor does: the model in memory, a batch in, its outcome out.

    An error that is the user's (model files that differ, settings that cannot be) comes back as a row, so
    that Ray does not try it again on every node.

    Args:
        weights: SHA-256 of the model's files; those of this node must be the same.
        threads: of PyTorch, as many as the run's manifest says: the last bits depend on them.
    """

    def __init__(
        self, model: ModelChoice, weights: str, threads: int, load: Callable[..., InterleavedGenerator]
    ):
        self.model, self.weights, self.threads, self.load = model, weights, threads, load
        self.generator: InterleavedGenerator | FittingGenerator | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        [row] = block.to_pylist()
        documents, settings = batch_of_row(row)
        with _Warnings() as warnings:
            outcomes: list[Outcome] = []
            error = None
            try:
                outcomes = self._continue(documents, settings)
            except MMInterleavedError as found:
                error = found
        outcome = BatchOutcome(row[ID], outcomes, error, warnings.messages)
        return table_of(row_of_outcome(documents, outcome))

    def _continue(
        self, documents: Sequence[Document], settings: Sequence[GenerationSettings]
    ) -> list[Outcome]:
        if self.generator is None:
            self.generator = self._load()
        self.generator.warn_of_unknown_words(documents)
        found: dict[int, Outcome] = {}
        for place, event in self.generator.stream_batch(documents, settings=settings):
            if isinstance(event, Finished):
                found[place] = event.document
            elif isinstance(event, Failed):
                found[place] = event.error
        return [found[place] for place in range(len(documents))]

    def _load(self) -> InterleavedGenerator | FittingGenerator:
        import torch

        torch.set_num_threads(self.threads)
        folder = find_model(self.model.name)
        if hash_model(folder) != self.weights:
            raise ModelFileError(
                f"{folder}: its files are not those of the run (SHA-256 differs) on a node of the cluster; "
                "expected the same model on all nodes"
            )
        return loaded(self.model, folder, self.load)


class _Warnings(logging.Handler):
    """Keeps what is logged as a warning in this package; what an actor logs is seen by nobody."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord):
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger("mm_interleaved").addHandler(self)
        return self

    def __exit__(self, *_: object):
        logging.getLogger("mm_interleaved").removeHandler(self)
