"""The official checkpoint as files: which there are, what they hold, and their tensors one by one.

A `.bin` is a pickle; it is only ever read with `weights_only=True`, and what that refuses is refused.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_interleaved.errors import ModelFileError, escape
from mm_interleaved.model_files.headers import check_index, read_header, read_index, refuse_duplicates

HASHES = "SHA256SUMS"
# What trainers leave beside the weights; the official loader would stumble over it.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(\.bin|\.safetensors)")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights and the shapes of its tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, each mapped from the file and read when it is used. Raises ModelFileError."""
        if self.path.suffix == ".bin":
            yield from _load_bin(self.path, "cpu").items()
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in self.shapes:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{self.path}: cannot be read ({escape(str(error))})") from error


def open_checkpoint(path: Path) -> tuple[Shard, ...]:
    """The shards of an official checkpoint: a folder, with or without index, or one file.

    Raises:
        ModelFileError: a shard is missing, damaged, pickled code, or listed wrongly; a name stands in two
            shards.
    """
    index, files = _find_files(path)
    placed = read_index(index) if index else {}
    files = files or sorted({index.parent / shard for shard in placed.values()})
    _check_files(files)
    shards, seen = [], {}
    for file in files:
        shapes = _shapes(file)
        refuse_duplicates(seen, shapes, file)
        seen.update(dict.fromkeys(shapes, file.name))
        shards.append(Shard(file, shapes))
    if index:
        check_index(index, placed, seen)
    return tuple(shards)


def _find_files(path: Path) -> tuple[Path | None, list[Path]]:
    """An index, or the files themselves."""
    if not path.exists():
        raise ModelFileError(f"{path}: there is no such file or folder, expected the official checkpoint")
    if path.is_file():
        return (path, []) if path.name.endswith(".index.json") else (None, [path])
    indices = sorted(path.glob("*.index.json"), reverse=True)
    for index in indices:
        # Of two, the one that says safetensors; of one, that one.
        if "safetensors" in index.name or len(indices) == 1:
            return index, []
    if indices:
        return indices[0], []
    for pattern in (
        "model.safetensors",
        "model-*.safetensors",
        "pytorch_model*.bin",
        "*.safetensors",
        "*.bin",
    ):
        files = sorted(file for file in path.glob(pattern) if file.name not in _NO_WEIGHTS)
        if files:
            return None, files
    raise ModelFileError(f"{path}: holds neither *.safetensors nor *.bin, expected the official checkpoint")


def _check_files(files: list[Path]) -> None:
    """Refuse missing files, numbered series with a hole, and files that differ from the list of hashes."""
    for file in files:
        if not file.is_file():
            raise ModelFileError(f"{file}: there is no such shard, {len(files)} are expected")
        numbered = _NUMBERED.fullmatch(file.name)
        if numbered and int(numbered[3]) != len(files):
            raise ModelFileError(
                f"{file.parent}: {len(files)} shards, {escape(file.name)} states {int(numbered[3])}"
            )
    hashes = files[0].parent / HASHES
    if not hashes.is_file():
        return
    try:
        lines = [line.split(maxsplit=1) for line in hashes.read_text("utf-8").splitlines() if line.strip()]
        expected = {name.strip().lstrip("*"): digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{hashes}: cannot be read, expected lines of hash and file name") from error
    for file in files:
        with open(file, "rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if file.name in expected and expected[file.name].lower() != found:
            raise ModelFileError(f"{file}: SHA-256 {found}, {HASHES} states {escape(expected[file.name])}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        return {name: header.shape for name, header in read_header(file).items()}
    if file.suffix != ".bin":
        raise ModelFileError(f"{file}: is of type {file.suffix or 'none'}, expected .safetensors or .bin")
    return {name: tuple(tensor.shape) for name, tensor in _load_bin(file, "meta").items()}


def _load_bin(file: Path, device: str) -> dict[str, Tensor]:
    """A flat dictionary of tensors; on "cpu" they stay mapped to the file."""
    try:
        with open(file, "rb") as data:
            is_archive = data.read(2) == b"PK"
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read ({error.strerror})") from error
    if is_archive and not zipfile.is_zipfile(file):
        raise ModelFileError(f"{file}: {file.stat().st_size} bytes, its end is missing; the file is cut")
    try:
        state = torch.load(file, map_location=device, weights_only=True, mmap=is_archive)
    except Exception as error:
        # Whatever torch raises of a file, the answer is the same: it is not read in any other way.
        if type(error).__name__ == "UnpicklingError":
            raise ModelFileError(
                f"{file}: refused, since it holds pickled objects other than tensors, which could run code"
            ) from error
        raise ModelFileError(f"{file}: cannot be read ({escape(' '.join(str(error).split()))})") from error
    if not isinstance(state, dict):
        raise ModelFileError(f"{file}: holds {type(state).__name__}, expected a dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelFileError(
                f"{file}: {escape(str(name))!r} is {type(value).__name__}, expected a name and its tensor"
            )
    return state
