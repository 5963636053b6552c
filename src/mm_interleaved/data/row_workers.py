"""The processes that read rows: each reads some of a rank's row streams, and gives one row of each a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from mm_interleaved.data.encoding import Skip
from mm_interleaved.data.row_streams import RowStreams
from mm_interleaved.errors import MMInterleavedError, StorageError
from mm_interleaved.files import forget_locks
from mm_interleaved.tokens.batch import Batch
from mm_interleaved.tokens.processor import MMInterleavedProcessor


class PixelRow(NamedTuple):
    """A row as a batch of one, with what the loader has to know about it."""

    stream_index: int
    batch: Batch
    source: str
    document_ids: tuple[str, ...]
    skips: tuple[Skip, ...]
    state: Mapping[str, Any]


class _Failure(NamedTuple):
    """An error of a worker, handed over without the traceback that a worker's exceptions carry as text.

    In parts: an exception that a frame of its own traceback holds lives until the garbage is collected, and
    with it the loader, whose processes then wait for each other.
    """

    kind: type[MMInterleavedError]
    message: str
    field: str | None


@dataclass(frozen=True)
class RowDataset(IterableDataset[Any]):
    """One list of rows a step: of all row streams that this process reads."""

    row_streams: RowStreams
    processor: MMInterleavedProcessor
    stream_indices: Sequence[int]
    states: Mapping[int, Mapping[str, Any]]
    target_pixels: bool

    def __iter__(self) -> Iterator[list[PixelRow | _Failure]]:
        worker = get_worker_info()
        own = self.stream_indices if worker is None else self.stream_indices[worker.id :: worker.num_workers]
        streams = [self.row_streams.rows(index, self.states.get(index)) for index in own]
        while True:
            try:
                rows = [next(stream) for stream in streams]
                batches = [
                    self.processor.collate([list(row.sequences)], target_pixels=self.target_pixels)
                    for row in rows
                ]
            except MMInterleavedError as error:
                yield [_Failure(type(error), str(error), error.field)]
                return
            yield [
                PixelRow(row.stream_index, batch, row.source, row.document_ids, row.skips, row.state)
                for row, batch in zip(rows, batches, strict=True)
            ]


def begin_worker(_: int) -> None:
    """Signals that stop a run reach all of its processes; this one ends with the one that it works for.

    The locks of that one are forgotten here: otherwise the run's folder would stay locked as long as a worker
    lives.
    """
    forget_locks()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(rows: Any) -> Any:
    """Leaves rows uncollated: the loader makes the batches, out of the rows of all processes."""
    return rows


def next_rows(items: Iterator[list[PixelRow | _Failure]]) -> list[PixelRow]:
    """The rows that one process has for a step."""
    try:
        found = next(items)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        # Out of memory, mostly: the system ends the process without a word.
        raise StorageError(f"a process that reads the data ended ({str(error).splitlines()[0]})") from error
    rows = []
    for row in found:
        if isinstance(row, _Failure):
            raise row.kind(row.message, field=row.field)
        rows.append(row)
    return rows
