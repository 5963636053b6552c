"""What model files say of themselves, before a weight is read; loads neither torch nor transformers.

A safetensors file is the length of its header, the header (JSON: dtype, shape and place of each tensor), the
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mm_interleaved.documents.strict_json import parse_strict
from mm_interleaved.errors import InputError, ModelFileError, escape

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model folder, without reading a weight.

    Raises:
        ModelFileError: a file is missing, cut, or claims what it does not hold; or a name stands in two
            files.
    """
    index = folder / INDEX
    if index.is_file():
        placed = read_index(index)
        paths = sorted({folder / shard for shard in placed.values()})
    else:
        placed = {}
        whole = folder / "model.safetensors"
        paths = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelFileError(f"{folder}: holds no *.safetensors file, expected the weights of a model")
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        found = read_header(path)
        refuse_duplicates(headers, found, path)
        headers.update(found)
    check_index(index, placed, {name: header.file for name, header in headers.items()})
    return headers


def saved_format(folder: Path) -> str:
    """The number format in which most of a model's weights are saved, by torch's name; empty if none floats.

    Raises:
        ModelFileError: see `tensor_headers`.
    """
    sizes: dict[str, int] = {}
    for header in tensor_headers(folder).values():
        if name := _FLOATING.get(header.dtype):
            sizes[name] = sizes.get(name, 0) + header.num_bytes
    return max(sizes, key=lambda name: sizes[name], default="")


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one safetensors file, checked against the file's size. Raises ModelFileError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or header_size > min(size - 8, _HEADER_LIMIT):
                raise ModelFileError(
                    f"{path}: {size} bytes, its header states {header_size + 8}; it is cut or damaged"
                )
            data = file.read(header_size)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        entries = parse_strict(data.decode("utf-8"), str(path))
        entries.pop("__metadata__", None)
        headers, spans = {}, []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            spans.append((begin, end))
            headers[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), end - begin, path.name)
        has_gaps = any(a[1] != b[0] for a, b in zip([(0, 0), *sorted(spans)], sorted(spans), strict=False))
        is_lying = any(_is_lying(header) for header in headers.values())
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: its header is damaged, expected a safetensors file") from error
    expected = 8 + header_size + max((end for _, end in spans), default=0)
    if size != expected:
        raise ModelFileError(
            f"{path}: {size} bytes, its header states {expected}; the file is cut or damaged"
        )
    if has_gaps or is_lying:
        raise ModelFileError(
            f"{path}: its header is damaged, tensors overlap or differ in size from their shapes"
        )
    return headers


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor of a sharded checkpoint.

    Raises:
        ModelFileError: no index, a shard that is missing, or one that would lie in another folder.
    """
    index = read_json(path)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise ModelFileError(f"{path}: found no field weight_map, expected one with the file of each tensor")
    for shard in sorted(set(placed.values())):
        plain = PurePosixPath(shard).name == shard == PureWindowsPath(shard).name
        if not plain or shard in ("", "..") or not shard.isprintable():
            raise ModelFileError(
                f"{path}: names the shard {escape(shard)!r}, expected a file in the same folder"
            )
    return placed


def check_index(path: Path, placed: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse an index that lists other tensors than its shards hold. `found`: file of each tensor."""
    if not placed:
        return
    for name in sorted(placed.keys() | found.keys()):
        if placed.get(name) != found.get(name):
            raise ModelFileError(
                f"{path}: tensor {escape(name)!r} is in {escape(str(found.get(name, 'no shard')))}, "
                f"expected in {escape(placed.get(name, 'none: it is not listed'))}"
            )


def refuse_duplicates(known: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Refuse a file whose tensors stand in another file already."""
    twice = sorted(known.keys() & new.keys())
    if twice:
        raise ModelFileError(
            f"{path}: holds {escape(twice[0])!r}, which another shard holds too ({len(twice)} such tensors)"
        )


def read_json(path: Path) -> Any:
    """A JSON file of a model, read strictly. Raises ModelFileError."""
    try:
        return parse_strict(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: is no UTF-8, expected JSON") from error
    except InputError as error:
        raise ModelFileError(str(error)) from error


def _is_lying(header: TensorHeader) -> bool:
    known = _BYTES.get(header.dtype)
    return known is not None and header.num_bytes != known * math.prod(header.shape)
