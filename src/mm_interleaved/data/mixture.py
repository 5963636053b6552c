"""Which corpora are mixed by which weights, and how their documents are used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import isfinite

from mm_interleaved.data.few_shot import FewShot
from mm_interleaved.data.packing import RowRule
from mm_interleaved.data.source import Shard, Source, shards_of
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.tokens.sequence import LearningRule

# Domain of the seeds, so that no two kinds of choices share their random numbers.
_ROW_DOMAIN = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSource:
    """One corpus of a mixture, and how its documents are used."""

    name: str
    source: Source
    weight: float = 1.0
    """Share of the rows, against the other weights."""
    max_images: int | None = None
    """Images a row."""
    too_long: str = "cut"
    """What happens to a document that is longer than a row: `cut` at the borders of its parts, or `skip`."""
    learn: LearningRule = field(default_factory=LearningRule)
    """What counts of documents that do not say it themselves."""
    few_shot: FewShot | None = None
    """Merge some of the documents into few-shot documents."""
    shuffle_block: int = 256
    """Documents that are read, shuffled and merged together; 1 keeps the order of the files."""
    keep_pairs: bool = False
    """See `RowRule`; matters with `compat` only."""

    def __post_init__(self):
        if not (isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"source {self.name!r}: weight must be 0 or more, found {self.weight}")
        if self.shuffle_block < 1:
            raise UsageError(f"source {self.name!r}: shuffle_block must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Corpora and their weights; each row is filled from one of them."""

    sources: tuple[MixtureSource, ...]
    max_length: int = 2048
    """Tokens a row."""
    compat: str | None = None
    """`released` fills rows as the published loader does, see `packing`."""

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        names = [entry.name for entry in self.sources]
        if not names:
            raise UsageError("the mixture is empty, expected at least one source")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UsageError(f"the mixture has two sources called {twice[0]!r}, expected different names")
        if not sum(entry.weight for entry in self.sources) > 0:
            raise UsageError(f"the weights of {', '.join(names)} are all 0, expected one above 0")
        for entry in self.sources:
            self.row_rule(entry)

    def row_rule(self, entry: MixtureSource) -> RowRule:
        """How rows of a source are filled."""
        return RowRule(
            max_length=self.max_length,
            max_images=entry.max_images,
            too_long=entry.too_long,
            compat=self.compat,
            keep_pairs=entry.keep_pairs,
        )

    def source_of_row(self, seed: int, stream_index: int, row: int) -> MixtureSource:
        """The source that fills a row of a row stream."""
        rng = SeededRandom(_ROW_DOMAIN, seed, stream_index, row)
        return rng.weighted(self.sources, [entry.weight for entry in self.sources])

    def find_shards(self) -> dict[str, tuple[Shard, ...]]:
        """The shards of every source that has a weight.

        Raises:
            InputError: a source has none, or cannot be read.
        """
        shards = {entry.name: tuple(shards_of(entry.source)) for entry in self.sources if entry.weight > 0}
        empty = [name for name, found in shards.items() if not found]
        if empty:
            raise InputError(f"source {empty[0]!r}: found no shards, expected at least one")
        return shards
