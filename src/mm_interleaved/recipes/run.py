"""A recipe run by its name: settings resolved, stages trained, resumable. What `mm-interleaved train` calls.

PyTorch is loaded when the settings are known to be right.
"""

import json
import logging
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mm_interleaved.devices import rank_device
from mm_interleaved.errors import MMInterleavedError, StorageError, UsageError
from mm_interleaved.files import locked_folder, make_folder, remove_temporary_files, write_file
from mm_interleaved.recipes.registry import RECIPES, Recipe
from mm_interleaved.spelling import unknown_name
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.settings import LOG_NAME, stages
from mm_interleaved.typed_settings import flat_record, from_record, override, to_record

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"


def run_recipe(
    name: str,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    out: Path,
    show_progress: bool = False,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> Path:
    """Trains a recipe in a folder and returns the folder of the finished model.

    Under torchrun every process calls it.

    Args:
        name: a recipe, or the `settings.json` of an earlier run, which is run again.
        overrides: assignments such as `image.steps=500`.
        resume: go on with what `out` holds, with the settings that it began with; without it `out` must not
            hold a run.
        recipes: those that there are, by name.
        out: gets `settings.json`, a folder of checkpoints and a log for each stage, and `model`.

    Raises:
        UsageError: unknown recipe or setting; a run is there already, or (with `resume`) none is; another
            process is at work in the folder.
        NumericalError: a loss was not finite.
        StoppedBySignal: a signal came; everything is saved.
        StorageError: the disk refused.
    """
    name, settings = _settings_of(name, recipes)
    path = out / SETTINGS_NAME
    if not resume and _has_begun(out):
        raise UsageError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    # Not Path.exists, which raises where a name is too long.
    if resume and not os.path.exists(path):
        raise UsageError(f"--resume: {out} holds no run ({SETTINGS_NAME} is not there)")
    if resume:
        settings = _settings_to_resume(path, name, recipes[name])
    former_names = recipes[name].former_names
    begun, settings = settings, override(settings, present_assignments(overrides, former_names))
    if _has_begun(out):
        _refuse_changes(out, begun, settings, recipes[name].may_change)
    is_first = os.environ.get("RANK", "0") == "0"
    if show_progress:
        _hide_bars_of_libraries()
    if is_first:
        _report_number_formats(settings)
        make_folder(out)
    with (
        locked_folder(out) if is_first else nullcontext(),
        _exit_status(out),
        _kept_settings(path, name, settings, former_names) if is_first else nullcontext(),
    ):
        if is_first:
            remove_temporary_files(out)
        return recipes[name].train(settings, out, show_progress=show_progress)


def _hide_bars_of_libraries() -> None:
    """Those of loading and writing weights, which would stand beside our own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _report_number_formats(settings: Any) -> None:
    """One line where stages compute in another format than usual, or in a slow one."""
    device = rank_device(settings.device)
    formats = [stage.number_format(device) for stage in stages(settings).values()]
    for remark in dict.fromkeys(found.remark for found in formats if found.remark):
        logger.warning("%s", remark)


def export(run: Path, out: Path) -> int:
    """Writes the model of a run's newest checkpoint as a folder that `--model` takes.

    Returns:
        How many steps it was trained.

    Raises:
        UsageError: no run, or one whose recipe makes its model in stages.
        ModelFileError: the run has no whole checkpoint.
    """
    path = run / SETTINGS_NAME
    if not path.exists():
        raise UsageError(f"{run}: holds no run ({SETTINGS_NAME} is not there)")
    name, settings = _settings_of(str(path), RECIPES)
    if not isinstance(settings, TrainConfig):
        raise UsageError(
            f"{run}: {name} makes its model in stages and leaves it in {run / 'model'} when all are done"
        )
    from mm_interleaved.recipes.documents import export_run

    return export_run(settings, run, out)


def _has_begun(out: Path) -> bool:
    """Something has been trained there; settings alone are what a run leaves that was refused."""
    return os.path.isdir(out) and bool(_below(out, LOG_NAME) or _checkpoints(out))


def _settings_of(name: str, recipes: Mapping[str, Recipe]) -> tuple[str, Any]:
    """Recipe and settings that a name or a file of settings stands for."""
    if name.endswith(".json"):
        record = _read(Path(name))
        recipe = record.get("recipe") if isinstance(record, dict) else None
        if not isinstance(recipe, str) or recipe not in recipes:
            raise UsageError(f"{name}: expected the settings of a run, with its recipe; found {recipe!r}")
        return recipe, _read_settings(recipes[recipe], record, name)
    if name not in recipes:
        raise UsageError(unknown_name("recipe", name, recipes), field="recipe")
    return name, recipes[name].settings()


def _settings_to_resume(path: Path, name: str, recipe: Recipe) -> Any:
    """The settings that a run began with."""
    record = _read(path)
    if not isinstance(record, dict) or "recipe" not in record:
        logger.warning("%s: written by an earlier version; the recipe's own settings are used", path)
        return recipe.settings()
    if record["recipe"] != name:
        raise UsageError(f"--resume: {path.parent} holds a run of {record['recipe']}, found {name}")
    return _read_settings(recipe, record, str(path))


def _read_settings(recipe: Recipe, record: Mapping[str, Any], name: str) -> Any:
    """The settings in the record of a run, under their present names."""
    settings = _present_names(record.get("settings"), recipe.former_names)
    return from_record(type(recipe.settings()), settings, name)


def _present_names(settings: Any, former_names: Mapping[str, str]) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    return {former_names.get(name, name): value for name, value in settings.items()}


def present_assignments(assignments: Iterable[str], former_names: Mapping[str, str]) -> list[str]:
    """Assignments such as `unet.steps=500`, where their settings had another name before."""
    renamed = []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        group, dot, rest = name.partition(".")
        renamed.append(f"{former_names.get(group, group)}{dot}{rest}{equals}{value}")
        if group in former_names:
            logger.warning("--set %s: the setting is called %s now", name, former_names[group] + dot + rest)
    return renamed


@contextmanager
def _kept_settings(
    path: Path, name: str, settings: Any, former_names: Mapping[str, str]
) -> Generator[None, None, None]:
    """Writes the settings; those of a resumed run come back if it is refused before it has gone on, so that
    what could not be set does not stand in the way of the next attempt.
    """
    record = {"recipe": name, "settings": to_record(settings)}
    earlier = path.read_bytes() if _has_begun(path.parent) else None
    if earlier is not None and _differs(_read(path), json.loads(json.dumps(record)), former_names):
        logger.warning("%s: settings differ from those the run began with; the new ones are used", path)
    write_file(path, (json.dumps(record, indent=2) + "\n").encode())
    checkpoints = _checkpoints(path.parent)
    try:
        yield
    except MMInterleavedError:
        if earlier is not None and _checkpoints(path.parent) == checkpoints:
            write_file(path, earlier)
        raise


def _differs(earlier: Any, record: Mapping[str, Any], former_names: Mapping[str, str]) -> bool:
    """Whether a run began with another record of settings, whatever their names were then."""
    if isinstance(earlier, dict) and "settings" in earlier:
        earlier = {**earlier, "settings": _present_names(earlier["settings"], former_names)}
    return earlier != record


def _checkpoints(out: Path) -> list[Path]:
    return _below(out, "step-*")


def _below(out: Path, pattern: str) -> list[Path]:
    """Files of that name in the folders of stages, which some recipes keep one deeper."""
    return sorted(path for place in ("*", "*/*") for path in out.glob(f"{place}/{pattern}"))


def _refuse_changes(out: Path, begun: Any, settings: Any, may_change: frozenset[str] | None) -> None:
    """Refuses another value of a setting that must stay as a run began with it."""
    if may_change is None:
        return
    before, now = (flat_record(one) for one in (begun, settings))
    for setting, value in now.items():
        if value != before[setting] and setting not in may_change:
            raise UsageError(
                f"--resume: {out} began with {setting}={before[setting]}, found {value}; what it has trained "
                f"so far would not compare, so only {', '.join(sorted(may_change))} may change: choose "
                "another folder"
            )


@contextmanager
def _exit_status(out: Path) -> Generator[None, None, None]:
    """Leaves each rank's end in a file: torchrun itself ends with 1 whatever it was."""
    rank = os.environ.get("RANK")
    code, reason = 1, "a bug of ours"
    try:
        yield
        code, reason = 0, "done"
    except MMInterleavedError as error:
        code, reason = error.exit_code, str(error)
        raise
    finally:
        if rank is not None and out.is_dir():
            status = {"rank": int(rank), "code": code, "reason": reason}
            # A disk that is full must not hide why the rank ended.
            with nullcontext() if code == 0 else suppress(StorageError):
                write_file(out / f"exit_status-{rank}.json", (json.dumps(status) + "\n").encode())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error})") from error
