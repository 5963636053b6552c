"""A finished run once more, with one part of one document made again.

The result is a run of its own, in a folder of its own: its input are the finished documents of the run
before, its manifest says which part was made again, and `replay` repeats it. Nothing of the run before is
changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.formats import read_record
from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.record_files import Record
from mm_interleaved.documents.strict_json import Field
from mm_interleaved.errors import InputError, MMInterleavedError, escape
from mm_interleaved.generation.events import Finished
from mm_interleaved.generation.settings import GenerationSettings, fails_alone
from mm_interleaved.runs.engine import OnEvent
from mm_interleaved.runs.folder import RunFolder, changed_files
from mm_interleaved.runs.results import RESULTS, read_results
from mm_interleaved.spelling import nearest

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redo:
    """One part of one document of a run, made again."""

    document: str
    """Its id."""
    part: int
    """From 0, as in `content[2]`."""
    rest: str = "keep"
    """What becomes of the parts after it, see `generation.redo.RESTS`."""

    def record(self) -> dict[str, Any]:
        """As a manifest says it."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Redo:
        """The same again."""
        return cls(document=record["document"], part=record["part"], rest=record["rest"])


def finished_documents(path: Path, manifest: Mapping[str, Any]) -> list[Document]:
    """The documents of a run as they were completed. Those that failed are left out, and logged.

    Raises:
        InputError: the run is not finished, or a line of its results is damaged.
    """
    if "outputs" not in manifest:
        raise InputError(f"{path}: the run is not finished, run its command again first")
    if changed := changed_files(path, manifest):
        logger.warning("%s: changed since the run ended, and taken as it is: %s", path, ", ".join(changed))
    documents: list[Document] = []
    failed: list[str] = []
    for number, (_, record) in enumerate(read_results(path / RESULTS), start=1):
        place = f"{path / RESULTS}:{number}"
        if record is None:
            raise InputError(f"{place}: is no result, expected a line that a run wrote")
        if "error" in record:
            failed.append(record["id"])
        else:
            documents.append(read_record(Record(place, number, Field(record)), ImageFolder(path, path)))
    if failed:
        names = ", ".join(map(escape, failed[:5]))
        logger.warning("%s: %d failed and are left out: %s", path, len(failed), names)
    return documents


def document_named(documents: list[Document], name: str | None, path: Path) -> Document:
    """The document with this id; without one, the only document.

    Raises:
        InputError: there is none, or more than one to choose from.
    """
    found = [document for document in documents if name in (None, document.id)]
    if len(found) == 1:
        return found[0]
    names = [document.id for document in documents]
    if name is None:
        expected = ", ".join(map(escape, names[:5])) + (" …" if len(names) > 5 else "")
        raise InputError(
            f"{path}: holds {len(names)} documents, expected one of them with --document: {expected}",
            field="document",
        )
    close = nearest(name, names)
    meant = f", did you mean {escape(repr(close))}?" if close else f", expected one of {len(names)} others"
    raise InputError(f"{path}: holds no document {escape(repr(name))}{meant}", field="document")


def new_run_folder(run: Path) -> tuple[Path, int]:
    """A folder beside a run's that is not there yet, `<run>-redo-<n>`, and n."""
    run = Path(os.path.abspath(run))
    numbered = ((run.with_name(f"{run.name}-redo-{number}"), number) for number in count(1))
    return next((path, number) for path, number in numbered if not os.path.lexists(path))


def redo_documents(
    run: RunFolder,
    generator: InterleavedGenerator,
    redo: Redo,
    settings: Mapping[str, GenerationSettings],
    on_event: OnEvent,
):
    """Write the documents of a run that has none yet: one with its part made again, the others as they are.

    Raises:
        UsageError: the part cannot be made again.
    """
    for document in run.pending():
        completed, outcome = document, "finished"
        if document.id == redo.document:
            try:
                events = generator.stream_redo(
                    document, redo.part, settings[document.id], rest=redo.rest, preview_every=0
                )
                for event in events:
                    on_event(document, event)
                    completed = event.document if isinstance(event, Finished) else completed
            except MMInterleavedError as error:
                if not isinstance(error, InputError) or not fails_alone(document, error):
                    raise
                run.commit_error(document, error)
                outcome = "failed"
        if outcome == "finished":
            run.commit(completed)
        on_event(document, outcome)
