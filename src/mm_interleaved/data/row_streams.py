"""Streams of rows without end, each the same in whatever process it is read.

A training run has a row stream for each row of the global batch: stream k gives row k of every step. A stream
has its own part of each corpus. It reads a block of documents, shuffles it, merges some (few-shot), and fills
rows. So what has been read is a few numbers for each stream and corpus: where the block begins, and how much
of it has gone into rows. A stream that goes on reads its block again and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mm_interleaved.data.encoding import Preparation, Prepared, Skip
from mm_interleaved.data.few_shot import group_documents
from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.data.packing import fill_row
from mm_interleaved.data.source import BrokenItem, FilteredItem, Item, Shard, in_epoch, items_of
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.record_rules import AS_TEXT
from mm_interleaved.errors import InputError, StorageError, escape
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.tokens.sequence import Sequence as TokenSequence
from mm_interleaved.tokens.sequence import slice_sequence
from mm_interleaved.tokens.vocabulary import Vocabulary

# Domain of the seeds, so that no two kinds of choices share their random numbers.
_SHARD_DOMAIN, _BLOCK_DOMAIN = 32, 33
RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waiting times before a shard whose storage failed is opened again."""
_MAX_IDLE = 1000
"""Documents in a row of which none can be used, before a source is given up."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A row, and the state of its stream after it."""

    stream_index: int
    number: int
    """Number of the row in its stream, from 0."""
    source: str
    sequences: tuple[TokenSequence, ...]
    document_ids: tuple[str, ...]
    skips: tuple[Skip, ...]
    """What was passed over on the way to this row."""
    state: dict[str, Any]
    """JSON: where the stream stands in each source, and its `counts`: `documents` in rows, `skipped_<kind>`,
    `filtered_<rule>`, `rows`, `tokens`, `images`, `cut`, `tokens_left_out`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStreams:
    """Reads any of the row streams of a run."""

    mixture: Mixture
    shards: Mapping[str, tuple[Shard, ...]]
    """Result of `Mixture.find_shards`."""
    vocabulary: Vocabulary
    num_streams: int
    seed: int

    def rows(self, stream_index: int, state: Mapping[str, Any] | None = None) -> Iterator[StreamRow]:
        """The rows of a stream after the one whose state is given, without end.

        Raises:
            InputError: a source gives nothing that can be used.
            StorageError: the storage failed again and again.
        """
        number, states = (0, {}) if state is None else (int(state["rows"]), state["sources"])
        sources = {
            entry.name: _SourceSequences(self, entry, stream_index, states.get(entry.name))
            for entry in self.mixture.sources
            if entry.weight > 0
        }
        while True:
            entry = self.mixture.source_of_row(self.seed, stream_index, number)
            sequences = sources[entry.name]
            row = sequences.next_row()
            number += 1
            states = {**states, entry.name: sequences.state()}
            yield StreamRow(
                stream_index,
                number - 1,
                entry.name,
                tuple(row),
                sequences.documents_of_row(),
                sequences.drain_skips(),
                {"rows": number, "sources": states},
            )

    def items(
        self, entry: MixtureSource, stream_index: int, begin: _Place
    ) -> Iterator[tuple[_Place, Item | None]]:
        """The items of a source that are this stream's, each with the place behind it; None ends an epoch."""
        number = [other.name for other in self.mixture.sources].index(entry.name)
        epoch, first, start = begin
        while True:
            source = in_epoch(entry.source, epoch)
            shuffled = _shuffled(self.shards[entry.name], _SHARD_DOMAIN, self.seed, number, epoch)
            shares = stream_shares(shuffled, stream_index + epoch, self.num_streams)
            for index in range(first, len(shares)):
                share = shares[index]
                for position, item in _read_on(source, share.shard, start):
                    if position % share.parts == share.part:
                        yield _Place(epoch, index, position + 1), item
                start = 0
            epoch, first, start = epoch + 1, 0, 0
            yield _Place(epoch), None


class Share(NamedTuple):
    """What a stream reads of a shard: the items whose position, divided by `parts`, leaves `part`."""

    shard: Shard
    part: int
    parts: int


def stream_shares(shards: Sequence[Shard], turn: int, num_streams: int) -> list[Share]:
    """What one stream reads in an epoch; the streams together read every item once.

    Whole shards if there are enough of them, parts of shards otherwise.

    Args:
        turn: number of the stream; streams change places from epoch to epoch, so that none stays without
            items.
    """
    turn %= num_streams
    if len(shards) >= num_streams:
        return [Share(shard, 0, 1) for shard in shards[turn::num_streams]]
    index = turn % len(shards)
    return [Share(shards[index], turn // len(shards), len(range(index, num_streams, len(shards))))]


class _Place(NamedTuple):
    """Where a stream stands in a source."""

    epoch: int = 0
    share: int = 0
    """Number of the shard, or part of one, in the stream's list of the epoch."""
    position: int = 0
    """Of the next item in it."""


class _Cursor(NamedTuple):
    """Where the rows of a stream stand in a source."""

    block: _Place = _Place()
    """Where the block of documents begins."""
    is_counted: int = 0
    """1 once what could not be read in the block has been counted."""
    group: int = 0
    """Number of the next group of documents in the block,"""
    piece: int = 0
    """of the next piece of its sequences,"""
    offset: int = 0
    """and of the next token in it."""


class _SourceSequences:
    """The sequences of one source in one row stream, without end (`packing.Sequences`)."""

    def __init__(
        self, streams: RowStreams, entry: MixtureSource, stream_index: int, state: Mapping[str, Any] | None
    ):
        self.streams, self.entry, self.stream_index = streams, entry, stream_index
        self.rule = streams.mixture.row_rule(entry)
        self.prepare = Preparation(
            source=entry.name,
            vocabulary=streams.vocabulary,
            rule=self.rule,
            learn=entry.learn,
            few_shot=entry.few_shot,
        )
        self.counts: Counter[str] = Counter()
        self.cursor = _Cursor()
        if state is not None:
            self.counts.update(state["counts"])
            block, *rest = state["cursor"]
            self.cursor = _Cursor(_Place(*block), *rest)
        self._items = streams.items(entry, stream_index, self.cursor.block)
        self._behind = self.cursor.block
        self._groups: list[tuple[Document, ...]] | None = None
        self._prepared: Prepared | None = None
        self._skips: list[Skip] = []
        self._documents: dict[str, None] = {}
        self._idle_epochs = self._idle_documents = 0

    def state(self) -> dict[str, Any]:
        block, *rest = self.cursor
        return {"cursor": [list(block), *rest], "counts": dict(self.counts)}

    # ---- Rows ------------------------------------------------------------------------------------

    def next_row(self) -> list[TokenSequence]:
        first_epoch = self.cursor.block.epoch
        while True:
            self._documents = {}
            row = fill_row(self, self.rule, self.streams.vocabulary.num_slots)
            num_images = sum(len(sequence.images) for sequence in row)
            if num_images or self.rule.compat != "released":
                self.counts.update(rows=1, tokens=sum(map(len, row)), images=num_images)
                return row
            # As published, but counted.
            self.counts["rows_without_images"] += 1
            if self._is_hopeless(self.cursor.block.epoch - first_epoch):
                raise InputError(f"source {self.entry.name!r}: found only rows without images")

    def documents_of_row(self) -> tuple[str, ...]:
        return tuple(self._documents)

    def drain_skips(self) -> tuple[Skip, ...]:
        skips, self._skips = tuple(self._skips), []
        return skips

    # ---- Sequences -------------------------------------------------------------------------------

    @property
    def is_inside(self) -> bool:
        return self.cursor.offset > 0

    def peek(self) -> TokenSequence:
        while self._prepared is None:
            groups = self._read_block() if self._groups is None else self._groups
            if self.cursor.group == len(groups):
                self.cursor, self._groups = _Cursor(self._behind), None
                continue
            self._prepared = self.prepare(groups[self.cursor.group])
            if not self._prepared.pieces:
                self._note(self._prepared)
                self._count_idle(groups[self.cursor.group], self._prepared)
                self._to_next_group()
        piece = self._prepared.pieces[self.cursor.piece]
        return slice_sequence(piece, self.cursor.offset, len(piece)) if self.cursor.offset else piece

    def take(self, num_tokens: int | None = None) -> None:
        assert self._prepared is not None and self._groups is not None, "what is taken has been seen"
        group, pieces = self._groups[self.cursor.group], self._prepared.pieces
        if self.cursor.piece == self.cursor.offset == 0:
            self._note(self._prepared)
            self._idle_epochs = self._idle_documents = 0
            self.counts["documents"] += len(group) - len(self._prepared.skips)
        left_out = {skip.place for skip in self._prepared.skips}
        self._documents.update({document.id: None for document in group if document.id not in left_out})
        length = len(pieces[self.cursor.piece])
        end = length if num_tokens is None else self.cursor.offset + num_tokens
        if end < length:
            self.cursor = self.cursor._replace(offset=end)
        elif self.cursor.piece + 1 < len(pieces):
            self.cursor = self.cursor._replace(piece=self.cursor.piece + 1, offset=0)
        else:
            self._to_next_group()

    def _to_next_group(self) -> None:
        self.cursor = self.cursor._replace(group=self.cursor.group + 1, piece=0, offset=0)
        self._prepared = None

    def _note(self, prepared: Prepared) -> None:
        """Counts what happened to a group; never twice, since the cursor moves behind it or into it."""
        self._skips += prepared.skips
        self.counts.update(prepared.counts)
        self.counts.update(f"skipped_{skip.kind}" for skip in prepared.skips)

    def _read_block(self) -> list[tuple[Document, ...]]:
        """The groups of the block that begins where the cursor says."""
        documents: list[Document] = []
        is_new = not self.cursor.is_counted
        while len(documents) < self.entry.shuffle_block:
            self._behind, item = next(self._items)
            if item is None:
                self._end_epoch()
                break
            if isinstance(item, Document):
                documents.append(item)
                if is_new and AS_TEXT in item.remarks:
                    self.counts["markup_as_text"] += 1
            elif is_new and isinstance(item, BrokenItem):
                self._note(Prepared(skips=(Skip(self.entry.name, item.place, "broken", _reason(item)),)))
            elif is_new and isinstance(item, FilteredItem):
                self.counts[f"filtered_{item.rule}"] += 1
        self.cursor = self.cursor._replace(is_counted=1)
        block = self.cursor.block
        rng = SeededRandom(
            _BLOCK_DOMAIN, self.streams.seed, self.stream_index, block.epoch, block.share, block.position
        )
        self._groups = group_documents(rng.sample(documents, len(documents)), self.entry.few_shot, rng)
        return self._groups

    def _end_epoch(self) -> None:
        self._idle_epochs += 1
        if self._is_hopeless(self._idle_epochs):
            self._give_up("found nothing that can be used")

    def _count_idle(self, group: Sequence[Document], prepared: Prepared) -> None:
        """Most sources are so large that waiting for the end of an epoch would be waiting for ever."""
        self._idle_documents += len(group)
        if self._idle_documents >= _MAX_IDLE:
            last = prepared.skips[-1]
            self._give_up(
                f"found nothing that can be used in {self._idle_documents} documents; "
                f"of the last one, {escape(last.place)}: {escape(last.reason, 300)}"
            )

    def _give_up(self, why: str) -> NoReturn:
        found = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()) if count)
        raise InputError(f"source {self.entry.name!r}: {why} ({found or 'no items'})")

    def _is_hopeless(self, num_epochs: int) -> bool:
        """Within so many epochs the stream has had each part of the source once."""
        return num_epochs > self.streams.num_streams + 1


def _read_on(source: Any, shard: Shard, start: int) -> Iterator[tuple[int, Item]]:
    """The items of a shard; storage that fails is tried again, from where it failed."""
    waits = list(RETRY_SECONDS)
    while True:
        try:
            for position, item in items_of(source, shard, start):
                yield position, item
                start = position + 1
            return
        except StorageError:
            if not waits:
                raise
            time.sleep(waits.pop(0))


def _reason(item: BrokenItem) -> str:
    return f"{item.field}: {item.reason}" if item.field else item.reason


def _shuffled(shards: Sequence[Shard], *seeds: int) -> list[Shard]:
    """Raw words of the generator are the same with every release of NumPy; ties are as good as impossible."""
    words = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(len(shards))
    return [shards[index] for index in np.argsort(words, kind="stable")]
