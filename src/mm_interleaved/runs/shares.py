"""A run that several processes do together: each but the first writes into a folder of its own.

    RUN/shares/<rank>/    results, hashes and images of that rank, as a run folder has them

The first rank holds the run's folder. When all are done, and before anything is begun, it takes over what
lies in shares: so nothing that a killed rank finished is made again, by however many ranks the run is taken
up.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mm_interleaved.documents.document import Document
from mm_interleaved.files import (
    is_real_folder,
    locked_folder,
    make_folder,
    put_aside,
    remove_folder,
    remove_temporary_files,
    storage_errors,
)
from mm_interleaved.runs.folder import SHARES, RunFolder, take_up


@contextmanager
def open_share(path: Path, rank: int, documents: Sequence[Document]) -> Generator[RunFolder, None, None]:
    """The folder of one rank in the run at `path`.

    Args:
        documents: all of the run; they name a document's images.

    Raises:
        UsageError: another process holds it.
        StorageError: it cannot be written.
    """
    place = path / SHARES / str(rank)
    make_folder(place)
    with locked_folder(place):
        share = RunFolder(place, {}, documents)
        take_up(share, retry_errors=False)
        yield share


def take_over_shares(run: RunFolder, *, retry_errors: bool = False):
    """Commits what ranks finished to the run, and removes their folders.

    Args:
        retry_errors: leave their failed documents to be made again.

    Raises:
        UsageError: a rank of an earlier start is still at work.
        StorageError: the disk failed or is full.
    """
    folder = run.path / SHARES
    if not os.path.lexists(folder):
        return
    if not is_real_folder(folder):
        put_aside(folder)
        return
    with storage_errors(folder, "read"):
        places = sorted(place for place in folder.iterdir() if is_real_folder(place))
    for place in places:
        with locked_folder(place):
            remove_temporary_files(place)
            share = RunFolder(place, {}, run.documents)
            take_up(share, retry_errors)
            run.adopt(share)
    remove_folder(folder)
