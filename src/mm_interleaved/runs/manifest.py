"""What a run is made of, as its `manifest.json` says it: read, and refused where it has another form."""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_interleaved.documents.strict_json import MAX_DEPTH, describe
from mm_interleaved.errors import InputError, escape
from mm_interleaved.files import is_regular_file

MANIFEST = "manifest.json"
FORMAT = "mm-interleaved run 1"
MAX_THREADS = 1024
_MANIFEST_FIELDS: dict[str, Any] = {
    "model": dict, "model.name": str, "model.sha256": str, "device": str, "dtype": str,
    "settings": dict, "flags": dict, "input": dict, "threads": int, "machine": dict, "versions": dict,
}  # fmt: skip
_OPTIONAL_FIELDS: dict[str, Any] = {
    "acceleration": dict, "acceleration.channels_last": bool, "acceleration.compile": bool,
    "acceleration.quantization": str, "acceleration.adapter": dict, "answering": dict, "outputs": dict,
    "redo": dict,
    "memory": str, "memory_plan": dict, "memory_changes": list,
}  # fmt: skip
_DEPENDENT_FIELDS: dict[str, dict[str, Any]] = {
    "acceleration.adapter": {"acceleration.adapter.folder": str, "acceleration.adapter.sha256": str},
    "outputs": {"outputs.records": dict, "outputs.images": dict},
    "redo": {"redo.document": str, "redo.part": int, "redo.rest": str},
    "memory_plan": {
        "memory_plan.dtype": str,
        "memory_plan.batch_size": int,
        "memory_plan.weights": int,
        "memory_plan.on_device": int,
        "memory_plan.on_host": int,
        "memory_plan.documents": int,
    },
}
"""Must be there where another field is."""


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest. Raises InputError where the file is missing or is something else."""
    if os.path.lexists(path) and not is_regular_file(path):
        raise InputError(f"{path}: is no regular file, expected the manifest of a run")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected the manifest of a run") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}), expected the manifest of a run") from error
    _check_form(path, manifest)
    return manifest


def batch_size_of(manifest: Mapping[str, Any]) -> int:
    """How many documents a run continues at once; runs from before there were batches do not say."""
    return manifest.get("batch_size", 1)


def _check_form(path: Path, manifest: Any):
    if _is_deep(manifest):
        raise InputError(f"{path}: nested more than {MAX_DEPTH} levels deep, expected the manifest of a run")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format {escape(repr(found))}, expected {FORMAT!r}", field="format")
    optional = {
        name: kind for name, kind in _OPTIONAL_FIELDS.items() if _value_at(manifest, name) is not None
    }
    dependent = [fields for name, fields in _DEPENDENT_FIELDS.items() if name in optional]
    for name, kind in ChainMap(*reversed(dependent), optional, _MANIFEST_FIELDS).items():
        value = _value_at(manifest, name)
        if not isinstance(value, kind):
            raise InputError(
                f"{path}: {name}: found {describe(value)}, expected what a run writes there", field=name
            )
    if not 1 <= manifest["threads"] <= MAX_THREADS:
        raise InputError(
            f"{path}: threads: found {manifest['threads']}, expected 1 to {MAX_THREADS}", field="threads"
        )
    batch_size = batch_size_of(manifest)
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(
            f"{path}: batch_size: found {escape(repr(batch_size))}, expected 1 or more", field="batch_size"
        )


def _value_at(manifest: Any, name: str) -> Any:
    """The value of a field such as `model.name`; None where there is none."""
    value = manifest
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_deep(value: Any) -> bool:
    """Nested deeper than anything that a run writes."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
