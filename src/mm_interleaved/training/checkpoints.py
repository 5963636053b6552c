"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00001200` with one safetensors file a group of tensors, `state.json`, and,
written last, `manifest.json` with the size and SHA-256 of every file. It is written beside its place and
renamed, so a crash at any point leaves the earlier checkpoints untouched. Nothing in it is a pickle.

Where tensors are spread over several processes, a group is a folder of safetensors files, which
torch.distributed.checkpoint writes and reads; it can be read by any number of processes.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from mm_interleaved.errors import ModelFileError, StorageError, UsageError, escape
from mm_interleaved.files import put_aside, remove_any, storage_errors
from mm_interleaved.runs.ranks import ALONE, Ranks
from mm_interleaved.training.parallel import is_spread

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"
_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    step: int
    """Optimizer steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Groups of named tensors, e.g. weights, averaged weights, moments of the optimizer."""
    state: Mapping[str, Any]
    """Everything else, as JSON."""


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A checkpoint on the disk, every file of it checked against the manifest."""

    folder: Path
    step: int
    state: Mapping[str, Any]
    groups: frozenset[str]

    def read(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, whole."""
        path = self._place(group)
        with _reading(path):
            if path.is_file():
                return load_file(path)
            metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
            tensors = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype)
                for name, entry in metadata.items()
            }
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
            return tensors

    def names(self, group: str) -> frozenset[str]:
        """The names of a group's tensors."""
        path = self._place(group)
        with _reading(path):
            if path.is_file():
                with safe_open(path, "pt") as file:
                    return frozenset(file.keys())
            return frozenset(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)

    def read_into(self, group: str, destination: Mapping[str, Tensor]) -> None:
        """Fills tensors of the same names; those that are spread over ranks get their shares.

        Raises:
            UsageError: names differ.
            StorageError: it cannot be read, or shapes differ.
        """
        path = self._place(group)
        found = self.names(group)
        if found != frozenset(destination):
            differing = sorted(found ^ frozenset(destination))[:3]
            raise UsageError(
                f"{path}: other weights than are trained now; only in one of the two: "
                f"{', '.join(differing)}; what trains cannot change on the way, but a new run can start from "
                "a run's model"
            )
        if path.is_file() and not is_spread(destination):
            with _reading(path):
                source: Mapping[str, Tensor] = load_file(path)
        else:
            source = self._shares(path, destination)
        with torch.no_grad(), _reading(path):
            for name, tensor in destination.items():
                tensor.copy_(source[name].reshape(tensor.shape))

    def _shares(self, path: Path, destination: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors like `destination`, which is spread or was saved so."""
        with _reading(path):
            if path.is_file():
                return {name: _share(tensor, destination[name]) for name, tensor in load_file(path).items()}
            shares = {name: _storable(torch.empty_like(tensor)) for name, tensor in destination.items()}
            # Who wants whole tensors reads them alone: the other ranks may be elsewhere.
            is_alone = not is_spread(destination)
            dcp.load(shares, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=is_alone)
            return shares

    def _place(self, group: str) -> Path:
        path = self.folder / f"{group}{_SUFFIX}"
        return path if path.is_file() else self.folder / group


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int = 2, ranks: Ranks = ALONE) -> Path:
    """Writes a checkpoint below `root`, removes all but the newest `keep`, and returns its folder.

    All ranks call it. What is spread over them is written by all of them, everything else by the first.

    Raises:
        StorageError: the file system refused (full, read-only); earlier checkpoints are still whole.
    """
    folder = root / f"step-{checkpoint.step:08d}"
    temporary = root / f".tmp-{folder.name}"
    shared = {group: tensors for group, tensors in checkpoint.tensors.items() if is_spread(tensors)}
    alone = {group: tensors for group, tensors in checkpoint.tensors.items() if group not in shared}

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        temporary.mkdir()
        for group, tensors in alone.items():
            contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{group}{_SUFFIX}")
        _write_json(temporary / _STATE, {"step": checkpoint.step, **checkpoint.state})

    def commit(fingerprints: Mapping[str, Any]) -> None:
        for path in temporary.rglob("*"):
            _sync(path)
        _write_json(temporary / _MANIFEST, dict(sorted(fingerprints.items())))
        _sync(temporary / _MANIFEST)
        _sync(temporary)
        if os.path.lexists(folder):
            # Whatever it is, this run did not write it: what it had not done yet it put aside when it began.
            logger.warning("%s: was there already, now %s", folder, put_aside(folder).name)
        temporary.rename(folder)
        _sync(root)
        rotate(root, keep)

    try:
        _first(ranks, begin)
        for group, tensors in shared.items():
            _together(ranks, lambda group=group, tensors=tensors: _write_shares(temporary / group, tensors))
        fingerprints = _fingerprints(temporary, ranks)
        _first(ranks, lambda: commit(fingerprints))
    except StorageError as error:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{folder}: the checkpoint could not be written: {error}") from error
    return folder


def newest_checkpoint(
    root: Path, ranks: Ranks = ALONE, *, accept: Callable[[CheckedFolder], None] = lambda checkpoint: None
) -> CheckedFolder | None:
    """The newest whole checkpoint below `root`, or None if nothing there has the name of one.

    Where the newest is damaged, the one before is taken, with a warning (see `tidy`).

    Args:
        accept: raises StorageError where what a checkpoint says is not what its reader needs.

    Raises:
        ModelFileError: there are checkpoints, but not one of them is whole; nothing starts again from step 0.
        StorageError: the folder cannot be read.
    """
    problems: list[str] = []
    for place in reversed(_candidates(root)):
        try:
            found = open_checkpoint(place, ranks)
            accept(found)
        except StorageError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s; the checkpoint of step %d is used", problem, found.step)
        return found
    if problems:
        raise ModelFileError(f"{root}: no checkpoint is whole: {'; '.join(problems)}")
    return None


def tidy(root: Path, step: int, keep: int, ranks: Ranks = ALONE) -> None:
    """Makes the checkpoint of `step` the newest: what claims to be newer is damaged and gets another name;
    what is older than the newest `keep` is removed. All ranks call it.

    Raises:
        StorageError: the file system refused.
    """

    def work() -> None:
        for place in _candidates(root):
            if _step(place) > step or not place.is_dir():
                logger.warning(
                    "%s: damaged, now %s; going on from step %d", place, put_aside(place).name, step
                )
        rotate(root, keep)

    _first(ranks, work)


def open_checkpoint(folder: Path, ranks: Ranks = ALONE) -> CheckedFolder:
    """The checkpoint in `folder`, every file checked against the manifest first (the ranks share the work).

    Raises:
        StorageError: a file is missing, differs, is not named, or has another form than we write.
    """

    def check() -> None:
        manifest = _read_object(folder / _MANIFEST)
        files = _files(folder) - {_MANIFEST}
        if files != manifest.keys():
            name = min(files ^ manifest.keys())
            is_unnamed = name in files
            problem = "a file that the manifest does not name" if is_unnamed else "is named and is not there"
            raise StorageError(f"{folder / name}: {problem}")
        for name in sorted(files)[ranks.rank :: ranks.size]:
            found = _fingerprint(folder / name)
            if found != manifest[name]:
                raise StorageError(f"{folder / name}: expected {manifest[name]}, found {found}")

    try:
        _together(ranks, check)
        state = _read_object(folder / _STATE)
        step = state.pop("step", None)
        if type(step) is not int or step != _step(folder):
            raise StorageError(
                f"{folder / _STATE}: step: found {escape(repr(step))}, expected {_step(folder)}"
            )
    except StorageError as error:
        raise StorageError(f"{folder}: not a whole checkpoint: {error}") from error
    names = {name.split("/")[0].removesuffix(_SUFFIX) for name in _files(folder) if name.endswith(_SUFFIX)}
    return CheckedFolder(folder, step, state, frozenset(names))


def rotate(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; the newest has to be known to be whole."""
    for old in _candidates(root)[:-keep]:
        _remove(old)


def remove_leftovers(root: Path) -> None:
    """Deletes what an interrupted save or rotation left below `root`."""
    for path in [*root.glob(".tmp-step-*"), *root.glob(".del-step-*")]:
        remove_any(path)


def _write_shares(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save({name: _storable(tensor.detach()) for name, tensor in tensors.items()}, storage_writer=writer)


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, if `like` is spread."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _storable(tensor: Tensor) -> Tensor:
    """A counter as a vector of one: the safetensors format cannot give a part of a number."""
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _first(ranks: Ranks, work: Callable[[], None]) -> None:
    """Has the first rank do something while the others wait. Raises StorageError on all if it fails."""
    _together(ranks, work if ranks.is_first else lambda: None)


def _together(ranks: Ranks, work: Callable[[], None]) -> None:
    """Does something on all ranks. Raises StorageError on all if one fails, so that none waits for ever."""
    problem = ""
    try:
        work()
    # torch's CheckpointException is not even an Exception.
    except (OSError, ValueError, TypeError, SafetensorError, StorageError, CheckpointException) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    problems = [problem for problem in ranks.gather(problem) if problem]
    if problems:
        raise StorageError(problems[0])


@contextmanager
def _reading(path: Path):
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise StorageError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _fingerprints(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Size and hash of every file; each rank reads a part of them. Raises StorageError on all ranks."""
    mine: dict[str, Any] = {}

    def read() -> None:
        mine.update({n: _fingerprint(folder / n) for n in sorted(_files(folder))[ranks.rank :: ranks.size]})

    _together(ranks, read)
    return {name: found for part in ranks.gather(mine) for name, found in part.items()}


def _candidates(root: Path) -> list[Path]:
    """Everything that has the name of a checkpoint, oldest first, whole or not: one that somebody copied in
    part must not be passed over unsaid.
    """
    with storage_errors(root, "read"):
        names = os.listdir(root) if os.path.lexists(root) else []
    return sorted((root / name for name in names if _NAME.fullmatch(name)), key=_step)


def _step(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object out of a file. Raises StorageError where it is something else."""
    if os.path.lexists(path) and not path.is_file():
        # A pipe would make us wait for ever.
        raise StorageError(f"{path}: is no regular file")
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _remove(folder: Path) -> None:
    """Deletes a checkpoint such that no half-deleted one can be taken for whole."""
    doomed = folder.with_name(f".del-{folder.name}")
    remove_any(doomed)
    folder.rename(doomed)
    remove_any(doomed)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
