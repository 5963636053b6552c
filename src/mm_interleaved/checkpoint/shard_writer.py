"""Tensors out to safetensors shards of bounded size, with the index that lists them."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.files import write_file

GIGABYTE = 10**9


class ShardWriter:
    """Holds tensors until a shard is full, so memory stays near one shard.

    Args:
        folder: an existing folder; better one that `storage.new_folder` gives.
        max_shard_bytes: size of a shard, except for a single tensor that is larger.
        kind: "safetensors", or "bin": what the official loader reads (plain tensors, pickled by torch).
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 5 * GIGABYTE, kind: str = "safetensors"):
        if max_shard_bytes < 1:
            raise UsageError(f"max_shard_bytes: found {max_shard_bytes}, expected at least 1")
        self.folder, self.max_shard_bytes, self.kind = folder, max_shard_bytes, kind
        self._stem = "model" if kind == "safetensors" else "pytorch_model"
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is copied, so it may be a view of a file."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._write()
        self._pending[name] = tensor.detach().contiguous().clone()
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write what is left and the index, and give the shards their names."""
        if self._pending:
            self._write()
        count, placed = len(self._shards), {}
        for number, (path, names) in enumerate(self._shards, start=1):
            series = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            final = path.with_name(f"{self._stem}{series}.{self.kind}")
            os.replace(path, final)
            placed.update(dict.fromkeys(names, final.name))
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(placed.items())),
            }
            data = json.dumps(index, indent=2).encode() + b"\n"
            write_file(self.folder / f"{self._stem}.{self.kind}.index.json", data)

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self._shards):05d}.{self.kind}"
        try:
            if self.kind == "safetensors":
                save_file(self._pending, path, metadata={"format": "pt"})
            else:
                torch.save(self._pending, path)
        except (SafetensorError, OSError, RuntimeError) as error:
            # Both libraries report a full disk in their own words.
            raise StorageError(f"{path}: {self._pending_bytes} bytes cannot be written ({error})") from error
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
