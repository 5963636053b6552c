"""The rows of each step of a training run, for any number of ranks and worker processes.

Each worker reads some of its rank's row streams and gives one row of each a step, with the stream's state
after it.
So the loader always knows where the steps that were taken end, however far workers have read ahead, and can
go on from there with other numbers of ranks and workers.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader

from mm_interleaved.data.encoding import Skip
from mm_interleaved.data.loader_state import STATE_VERSION, current_state, state_counts
from mm_interleaved.data.mixture import Mixture
from mm_interleaved.data.row_streams import RowStreams
from mm_interleaved.data.row_workers import PixelRow, RowDataset, as_it_is, begin_worker, next_rows
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.tokens.batch import Batch, blank_batch, stack_batches
from mm_interleaved.tokens.processor import MMInterleavedProcessor

logger = logging.getLogger(__name__)

BLANK_ROW = -1
"""Number of a row that is no row of the data, see `TrainingLoader`."""
_BAD_KINDS = ("broken", "image", "refused")
_TOLERATED = 10
"""Bad items that end no run, whatever their share: one in a hundred is many of a small corpus."""
_LOGGED_EACH = 100
"""Skips of a kind that are logged one by one; later ones, every so many."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together."""

    batch: Batch
    row_numbers: tuple[int, ...]
    """Number of each row in the whole run, whatever the ranks; BLANK_ROW for one that stands for nothing."""
    sources: tuple[str, ...]
    """Which source filled each row of the data."""
    document_ids: tuple[str, ...]
    """For messages."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """What one rank computes in one optimizer step."""

    step: int
    """From 0."""
    micro_batches: tuple[MicroBatch, ...]
    skips: tuple[Skip, ...]
    """Documents that were left out on the way; counted and logged already."""


class TrainingLoader:
    """The rows of a run, step by step and without end: all ranks always take equally many steps.

    Args:
        global_batch_size: rows of a step over all ranks. It alone, with the seed and the mixture, says which
            rows a step has.
        micro_batch_size: rows that go through the model at a time; the rest of a rank's rows is gradient
            accumulation.
        rank, num_ranks: the slice of each global batch that this loader gives.
        num_workers: worker processes; 0 reads in this one. Of no use are more than a rank has rows.
        target_pixels: also make what the image decoder has to generate.
        fixed_length: pad all rows to the mixture's length, so that all batches have one shape.
        add_blank_image: a micro-batch without any image gets a row with a blank one, which counts in no loss:
            all parameters then take part in every step on every rank.
        prefetch_steps: steps that each worker reads ahead.
        max_bad_fraction: share of items that are broken, have an unreadable image or cannot be encoded, above
            which (and above 10 of them) the run stops.

    Raises:
        UsageError: numbers that do not divide each other; target pixels of a model without image decoder.
        InputError: a source without shards.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: MMInterleavedProcessor,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        target_pixels: bool = True,
        fixed_length: bool = False,
        add_blank_image: bool = True,
        prefetch_steps: int = 2,
        max_bad_fraction: float = 0.001,
    ) -> None:
        if min(global_batch_size, micro_batch_size, num_ranks) < 1 or not 0 <= rank < num_ranks:
            raise UsageError(
                "global_batch_size, micro_batch_size and num_ranks must be 1 or more and rank below "
                f"num_ranks, found {global_batch_size}, {micro_batch_size}, {num_ranks} and {rank}"
            )
        if global_batch_size % (num_ranks * micro_batch_size):
            raise UsageError(
                f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size "
                f"{micro_batch_size} times {num_ranks} ranks"
            )
        if target_pixels and processor.target_pixels is None:
            raise UsageError(
                "target_pixels: the model's processor has no target_size: it has no image decoder"
            )
        self.mixture, self.processor, self.seed = mixture, processor, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        rows = global_batch_size // num_ranks
        self.stream_indices = range(rank * rows, (rank + 1) * rows)
        self.num_workers = min(num_workers, rows)
        self.target_pixels, self.fixed_length = target_pixels, fixed_length
        self.add_blank_image, self.prefetch_steps = add_blank_image, prefetch_steps
        self.max_bad_fraction = max_bad_fraction
        self.row_streams = RowStreams(
            mixture=mixture,
            shards=mixture.find_shards(),
            vocabulary=processor.vocabulary,
            num_streams=global_batch_size,
            seed=seed,
        )
        self._step = 0
        self._states: dict[int, Mapping[str, Any]] = {}
        self._loaded = 0
        self._logged: Counter[tuple[str, str]] = Counter()

    # ---- Steps -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[StepRows]:
        """The steps after those taken so far.

        Raises:
            InputError: too much of the data is bad, or a source gives nothing that can be used.
            StorageError: the storage or a worker process failed.
        """
        dataset = RowDataset(
            self.row_streams, self.processor, self.stream_indices, dict(self._states), self.target_pixels
        )
        # Each process gives a list of rows a step, in turn; nothing is left to collate.
        workers: dict[str, Any] = {"prefetch_factor": self.prefetch_steps} if self.num_workers else {}
        items: list[Iterator[Any]] = [
            iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=self.num_workers,
                    collate_fn=as_it_is,
                    worker_init_fn=begin_worker,
                    **workers,
                )
            )
        ]
        # Workers do not hear the signal with which multiprocessing ends them at the exit of the interpreter,
        # and it would wait for them for ever. So the loader lets go of them before: finalizers run first.
        let_go = weakref.finalize(self, items.clear)
        loaded = self._loaded
        try:
            while True:
                rows = list(chain.from_iterable(next_rows(items[0]) for _ in range(max(1, self.num_workers))))
                if loaded != self._loaded:
                    raise RuntimeError("the loader's state was loaded while its steps were being read")
                # Each process gives every so manyth stream; a step has its rows in the order of the streams.
                rows.sort(key=lambda row: row.stream_index)
                step = self._step
                self._step += 1
                self._states.update({row.stream_index: row.state for row in rows})
                skips = tuple(skip for row in rows for skip in row.skips)
                self._log(skips)
                self._check_quality()
                size = self.micro_batch_size
                micro = tuple(self._micro_batch(step, rows[i : i + size]) for i in range(0, len(rows), size))
                yield StepRows(step, micro, skips)
        finally:
            let_go()

    def _micro_batch(self, step: int, rows: Sequence[PixelRow]) -> MicroBatch:
        batches = [row.batch for row in rows]
        numbers = [step * self.global_batch_size + row.stream_index for row in rows]
        if self.add_blank_image and not any(batch.num_images for batch in batches):
            target = self.processor.target_pixels if self.target_pixels else None
            batches.append(blank_batch(self.processor.vocabulary, self.processor.encoder_pixels, target))
            numbers.append(BLANK_ROW)
        length = self.mixture.max_length if self.fixed_length else None
        return MicroBatch(
            stack_batches(batches, self.processor.vocabulary.pad, length),
            tuple(numbers),
            tuple(row.source for row in rows),
            tuple(document for row in rows for document in row.document_ids),
        )

    # ---- State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the steps taken so far end: JSON. Ranks have their own; see `merge_states`."""
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "settings": self._settings(),
            "row_streams": {str(index): state for index, state in sorted(self._states.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken, of one rank or merged of all.

        Raises:
            UsageError: the state belongs to other data or another global batch, or lacks row streams of this
                rank.
            ValueError: it has another form than `state_dict` gives.
        """
        state = current_state(state)
        then, now = state["settings"], self._settings()
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise UsageError(
                    f"data state: {name} was {then.get(name)!r} and is {now.get(name)!r} now; "
                    "rows go on only with the same data and the same global batch"
                )
        streams = state["row_streams"]
        missing = [index for index in self.stream_indices if str(index) not in streams]
        if missing and state["step"]:
            raise UsageError(
                f"data state: it lacks row stream {missing[0]} of this rank; merge the states of all ranks"
            )
        self._step = int(state["step"])
        self._states = {index: streams[str(index)] for index in self.stream_indices} if self._step else {}
        self._loaded += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """What this rank's row streams have read so far, by source: see `row_streams.StreamRow.state`."""
        return state_counts({"row_streams": self._states})

    def _settings(self) -> dict[str, Any]:
        """What rows depend on, flat, as JSON."""
        settings: dict[str, Any] = {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "max_length": self.mixture.max_length,
            "compat": self.mixture.compat,
        }
        for entry in self.mixture.sources:
            for name in (field.name for field in fields(entry)):
                if name not in ("name", "source"):
                    settings[f"{entry.name}.{name}"] = getattr(entry, name)
            settings[f"{entry.name}.shards"] = len(self.row_streams.shards.get(entry.name, ()))
        # As it comes back from a checkpoint, where tuples are lists: it is compared with one.
        return json.loads(json.dumps(settings, default=asdict))

    # ---- Skips -----------------------------------------------------------------------------------

    def _log(self, skips: Iterable[Skip]) -> None:
        for skip in skips:
            key = (skip.source, skip.kind)
            self._logged[key] += 1
            if self._logged[key] <= _LOGGED_EACH or self._logged[key] % _LOGGED_EACH == 0:
                logger.warning(
                    "source %s: left out %s (%s, number %d): %s",
                    skip.source,
                    escape(skip.place),
                    skip.kind,
                    self._logged[key],
                    escape(skip.reason, 600),
                )

    def _check_quality(self) -> None:
        for source, counts in self.counts().items():
            bad = sum(counts.get(f"skipped_{kind}", 0) for kind in _BAD_KINDS)
            read = counts.get("documents", 0) + sum(
                count for name, count in counts.items() if name.startswith("skipped_")
            )
            if bad > _TOLERATED and bad > self.max_bad_fraction * read:
                raise InputError(
                    f"source {source!r}: {bad} of {read} items are bad, expected at most a share of "
                    f"{self.max_bad_fraction} (max_bad_fraction); the log names them"
                )
