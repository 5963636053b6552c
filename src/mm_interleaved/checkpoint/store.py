"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00001200` with one safetensors file a group of tensors, `state.json`, and,
written last, `manifest.json` with the size and SHA-256 of every file. It is written beside its place and
renamed, so a crash at any point leaves the earlier checkpoints untouched. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_interleaved.errors import StorageError

_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    step: int
    """Optimizer steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Groups of named tensors, e.g. weights, averaged weights, moments of the optimizer."""
    state: Mapping[str, Any]
    """Everything else, as JSON."""


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes a checkpoint below `root`, removes all but the newest `keep`, and returns its folder.

    Raises:
        StorageError: the file system refused (full, read-only); earlier checkpoints are still whole.
    """
    folder = root / f"step-{checkpoint.step:08d}"
    temporary = root / f".tmp-{folder.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        temporary.mkdir()
        for group, tensors in checkpoint.tensors.items():
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary / f"{group}.safetensors",
            )
        _write_json(temporary / _STATE, {"step": checkpoint.step, **checkpoint.state})
        for path in temporary.iterdir():
            _sync(path)
        _write_json(
            temporary / _MANIFEST, {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        )
        _sync(temporary / _MANIFEST)
        _sync(temporary)
        if folder.exists():  # the same step again, e.g. after a stop right behind a periodic save
            _remove(folder)
        temporary.rename(folder)
        _sync(root)
        for old in _folders(root)[:-keep]:
            _remove(old)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{folder}: the checkpoint could not be written: {error}") from error
    return folder


def load_newest_checkpoint(root: Path) -> Checkpoint | None:
    """The checkpoint with the highest step below `root`, or None if there is none.

    Raises:
        StorageError: its files are not those that its manifest names.
    """
    folders = _folders(root)
    return load_checkpoint(folders[-1]) if folders else None


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every file checked against the manifest first.

    Raises:
        StorageError: a file is missing or differs.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name, expected in manifest.items():
            found = _fingerprint(folder / name)
            if found != expected:
                raise StorageError(f"{folder / name}: expected {expected}, found {found}")
        state = json.loads((folder / _STATE).read_text())
        tensors = {
            Path(name).stem: load_file(folder / name) for name in manifest if name.endswith(".safetensors")
        }
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: not a whole checkpoint: {error}") from error
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def remove_leftovers(root: Path) -> None:
    """Deletes what an interrupted save or rotation left below `root`."""
    for path in [*root.glob(".tmp-step-*"), *root.glob(".del-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first; a folder is committed by its rename, after its manifest."""
    return sorted(folder for folder in root.glob("step-*") if (folder / _MANIFEST).is_file())


def _remove(folder: Path) -> None:
    """Deletes a checkpoint such that no half-deleted one can be taken for whole."""
    doomed = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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
