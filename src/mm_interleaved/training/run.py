"""A recipe by name: its settings resolved, its stages run, resumable. What `mm-interleaved train` calls."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.recipes import storyworld
from mm_interleaved.training.settings import override, to_record

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What can be trained under a name."""

    settings: Callable[[], Any]
    """The default settings, a frozen dataclass."""
    train: Callable[..., Path]
    """(settings, folder, show_progress=) → the folder of the finished model."""


RECIPES = {"storyworld": Recipe(storyworld.StoryWorldConfig, storyworld.train)}


def run_recipe(
    name: str,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    out: Path,
    show_progress: bool = False,
) -> Path:
    """Trains a recipe in a folder and returns the folder of the finished model.

    Args:
        overrides: assignments such as `image.steps=500`.
        resume: go on with what `out` holds; without it `out` must not hold a run.
        out: gets `settings.json`, a folder of checkpoints and a log for each stage, and `model`.

    Raises:
        UsageError: unknown recipe or setting; a run is there already, or (with `resume`) none is.
        NumericalError: a loss was not finite.
        StoppedBySignal: a signal came; everything is saved.
        StorageError: the disk refused.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}{suggestion}")
    recipe = RECIPES[name]
    settings = override(recipe.settings(), overrides)
    _claim(out, settings, resume)
    return recipe.train(settings, out, show_progress=show_progress)


def _claim(out: Path, settings: Any, resume: bool) -> None:
    """Makes the folder of a run and leaves its settings there."""
    path = out / SETTINGS_NAME
    record = to_record(settings)
    if path.exists() and not resume:
        raise UsageError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not path.exists():
        raise UsageError(f"--resume: {out} holds no run ({SETTINGS_NAME} is not there)")
    if resume and _read(path) != json.loads(json.dumps(record)):
        logger.warning("%s: settings differ from those the run began with; the new ones are used", path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error})") from error
