"""A model's name in, its folder out; loads neither torch nor transformers.

A name is `storyworld` (the shipped model), a folder, or an id on the Hugging Face hub. A `Path` is always a
folder.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_interleaved.errors import ModelFileError, escape
from mm_interleaved.spelling import nearest

SHIPPED = ("storyworld",)
CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt")
"""Everything of a model but its weights."""
ALL_FILES = (*SMALL_FILES, "*.safetensors")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What says, in transformers' terms, where files of the hub come from."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REACH_SECONDS = 5.0


def find_model(
    name: str | os.PathLike[str], *, files: tuple[str, ...] = ALL_FILES, hub: Mapping[str, Any] | None = None
) -> Path:
    """The folder of a model.

    Args:
        files: patterns of what is fetched of a model on the hub.
        hub: some of `HUB_ARGUMENTS`.

    Raises:
        ModelFileError: there is none; states where it was searched for.
    """
    folder = find_folder(name, files=files, hub=hub)
    if not os.path.isfile(folder / CONFIG):
        what = "the shipped model" if _is_shipped(name) else "model"
        raise ModelFileError(
            f"{what} {escape(os.fspath(name))!r}: no {CONFIG} in {folder}, "
            "expected a folder that save_pretrained wrote"
        )
    return folder


def find_folder(
    name: str | os.PathLike[str], *, files: tuple[str, ...] = ALL_FILES, hub: Mapping[str, Any] | None = None
) -> Path:
    """As `find_model`, whatever the folder holds."""
    if _is_shipped(name):
        return shipped_folder(os.fspath(name))
    if not isinstance(name, str) or os.path.exists(name):
        return Path(name)
    return _from_hub(name, files, hub or {})


def shipped_folder(name: str) -> Path:
    """The folder of a shipped model."""
    return Path(str(importlib.resources.files("mm_interleaved") / "assets" / name))


def _is_shipped(name: str | os.PathLike[str]) -> bool:
    return isinstance(name, str) and name in SHIPPED


def _from_hub(name: str, patterns: tuple[str, ...], hub: Mapping[str, Any]) -> Path:
    right = nearest(name, SHIPPED)
    hint = "" if right is None else f" (did you mean {right!r}?)"
    looked = f"model {escape(name)!r}: no such folder{hint}"
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        raise ModelFileError(f"{looked}, and not a hub id (owner/name); shipped is {', '.join(SHIPPED)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = "only local files are allowed" if hub.get("local_files_only") else _out_of_reach(name, hub)
    given: dict[str, Any] = {**hub, "local_files_only": reason is not None}
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **given))
    except Exception as error:  # the hub client raises a dozen kinds; all mean that it is not to be had
        reason = reason or f"huggingface.co gave {type(error).__name__}"
        cache = hub.get("cache_dir") or HF_HUB_CACHE
        raise ModelFileError(f"{looked}, not in the hub cache {cache}, and {reason}") from error


def _out_of_reach(name: str, hub: Mapping[str, Any]) -> str | None:
    """Why the hub does not give a model, asked once; None if it does.

    A download asks again and again for most of a minute before it says that there is no network.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=hub.get("revision"), token=hub.get("token"), timeout=_REACH_SECONDS)
    except Exception as error:
        # No network, no such model, no right to it: the cache may have it all the same.
        return f"huggingface.co gave {type(error).__name__}"
    return None
