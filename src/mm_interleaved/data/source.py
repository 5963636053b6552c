"""What a source is: named shards, each a sequence of items that can be read on from any position.

An item is a document, or states by name why it gives none. The items of a shard, and their positions, are a
pure function of the files and of the source's settings (`seed` and `epoch` among them), so that a reader that
stopped after position p goes on with `read(shard, p + 1)`, in whatever process.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeAlias, TypeVar

from mm_interleaved.documents.document import Document, Image, Part
from mm_interleaved.documents.record_rules import finished, reason_to_leave_out
from mm_interleaved.documents.strict_json import Field, FieldError
from mm_interleaved.errors import InputError, MMInterleavedError, escape
from mm_interleaved.seeded_random import SeededRandom

logger = logging.getLogger(__name__)

_PARTS_OF_ONE = 1 << 30


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a source that is read from its beginning on; mostly a file."""

    name: str
    """Path or address; no two shards of a source share it."""
    num_items: int | None = None
    """How many items it has, where that costs nothing to know."""


@dataclass(frozen=True, slots=True)
class BrokenItem:
    """An item that cannot be read. It is to be counted and logged, never replaced by another."""

    place: str
    """File, and line, row, key or member in it."""
    reason: str
    """What was found and what was expected."""
    field: str | None = None
    """Path of the value in its record, such as `image_info[2].matched_text_index`."""

    def __str__(self) -> str:
        place = self.place
        if self.field:
            file, colon, record = place.rpartition(": ")
            # The field's path begins with its record's, which the place ends with.
            begins = colon and self.field.startswith(record)
            place = f"{file if begins else place}: {self.field}"
        return escape(f"{place}: {self.reason}", 600)


@dataclass(frozen=True, slots=True)
class FilteredItem:
    """A sound item that a rule of the source leaves out on purpose. It is to be counted."""

    place: str
    rule: str
    """A short name of the rule, such as `no_image`."""


Item: TypeAlias = Document | BrokenItem | FilteredItem


class Source(Protocol):
    """A frozen, picklable description of a corpus; it holds settings, no open files."""

    def shards(self) -> list[Shard]:
        """All shards, always in the same order.

        Raises:
            InputError: files that are not there (all of them are named), or a table that cannot be read.
            UsageError: settings that name nothing.
        """
        ...

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        """The items of a shard from position `start` on, each with its position, in ascending order.

        Raises:
            StorageError: the storage failed; reading on later may help.
        """
        ...


AnySource = TypeVar("AnySource", bound=Source)


def in_epoch(source: AnySource, epoch: int) -> AnySource:
    """The source as it is read in an epoch (from 0): what it chooses by chance is chosen anew."""
    settings: Any = source
    if isinstance(source, WholeDocuments):
        return replace(settings, source=in_epoch(source.source, epoch))
    if "epoch" not in {field.name for field in fields(settings)}:
        return source
    return replace(settings, epoch=epoch)


@dataclass(frozen=True, slots=True)
class WholeDocuments:
    """A source whose documents have no hole: what is asked and its answer are one text, and count alike."""

    source: Source

    @property
    def paths(self) -> Any:
        """What the source reads."""
        return getattr(self.source, "paths", ())

    def shards(self) -> list[Shard]:
        return self.source.shards()

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        for position, item in self.source.read(shard, start):
            if isinstance(item, Document) and item.target:
                item = replace(item, parts=(*item.parts, *item.target), target=())
            yield position, item


class ItemRandom:
    """The random choices about one item: a pure function of seed, epoch, shard and position."""

    def __init__(self, seed: int, epoch: int, shard: str, position: int) -> None:
        # Not the folder: a corpus that moves keeps its choices.
        name = shard.rsplit("/", 1)[-1].encode()
        self._rng = SeededRandom(seed, epoch, int.from_bytes(hashlib.sha256(name).digest()[:8]), position)

    def happens(self, share: float) -> bool:
        """True in a share (0 to 1) of all cases."""
        return self._rng.below(_PARTS_OF_ONE) < share * _PARTS_OF_ONE

    def order(self, count: int) -> list[int]:
        """The numbers below `count` in random order."""
        return self._rng.sample(range(count), count)

    def pick(self, count: int) -> int:
        """One of the numbers below `count`."""
        return self._rng.below(count)


def layout_of(target: Sequence[Part]) -> str | None:
    """The layout that asks for a target: its parts in order; None where there is no target."""
    return " ".join("I" if isinstance(part, Image) else "T" for part in target) or None


def shards_of(source: Source) -> list[Shard]:
    """The shards of a source; a file that it fails over is refused like one that is wrong.

    Raises:
        InputError, UsageError: as `Source.shards`.
    """
    try:
        return source.shards()
    except MMInterleavedError:
        raise
    except Exception as error:
        logger.debug("the source failed", exc_info=True)
        paths = escape(str(getattr(source, "paths", type(source).__name__)))
        raise InputError(f"{paths}: cannot be read ({_description(error)})") from error


def items_of(source: Source, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
    """The items of a shard as `Source.read` gives them; where the source itself fails, a broken item ends it.

    Raises:
        InputError, StorageError: as `Source.read`.
    """
    position = start - 1
    try:
        for position, item in source.read(shard, start):
            yield position, item
    except MMInterleavedError:
        raise
    except Exception as error:
        logger.debug("%s: the source failed", escape(shard.name), exc_info=True)
        yield position + 1, BrokenItem(shard.name, f"cannot be read on ({_description(error)})")


def _description(error: Exception) -> str:
    return f"{type(error).__name__}: {escape(str(error), 200)}"


def attempt(
    place: str,
    build: Callable[..., Document | FilteredItem],
    *records: Field,
    known: Collection[str] = (),
) -> Item:
    """What `build` makes of one item: a document by which nothing is lost, or why there is none.

    Every source makes its items here, so that what holds for all of them stands in one place: content that
    the source did not use makes an item broken, other unused fields become remarks, blank answers are left
    out, and no item, whatever it holds, ends the reading of the others.

    Args:
        build: gets the records, tracked, and asks them for all that it uses.
        records: what the item is made from.
        known: fields that the source leaves aside on purpose.

    Raises:
        StorageError: the storage failed.
    """
    tracked = [record.tracked() for record in records]
    try:
        made = build(*tracked)
        if isinstance(made, FilteredItem):
            return FilteredItem(place, made.rule)
        # A document with a place was finished by whoever read its record.
        document = made if made.place else finished(made, place, tracked, known=known)
        rule = reason_to_leave_out(document)
        return document if rule is None else FilteredItem(place, rule)
    except FieldError as error:
        path = error.path or None
        return BrokenItem(place, str(error).removeprefix(f"{error.path}: ") if path else str(error), path)
    except InputError as error:
        reason = str(error).removeprefix(f"{place}: ")
        return BrokenItem(place, reason.removeprefix(f"{error.field}: "), error.field)
    except MMInterleavedError:
        raise
    except Exception as error:
        # A fault of the source, not of the command: the item is named and counted like any other broken one.
        logger.debug("%s: the reader failed", escape(place), exc_info=True)
        return BrokenItem(place, f"cannot be read ({_description(error)})")
