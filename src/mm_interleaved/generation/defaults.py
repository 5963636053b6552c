"""The generation settings that a model prefers over the general ones; they stand in its config.json."""

from collections.abc import Mapping
from typing import Any

from mm_interleaved.errors import ModelFileError, UsageError, escape
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.model_files.resolve import CONFIG

FIELD = "generation_settings"


def defaults_of(model: Any) -> dict[str, Any]:
    """Those of a model that is loaded."""
    return getattr(model.config, FIELD, None) or {}


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a configuration as it was read (see `model_files.config.read_config`).

    Raises:
        ModelFileError: they are no settings, or values that cannot be.
    """
    found = config.get(FIELD) or {}
    if not isinstance(found, Mapping):
        raise ModelFileError(f"{CONFIG}: {FIELD}: found {escape(repr(found))}, expected an object")
    try:
        GenerationSettings.combine(found)
    except UsageError as error:
        raise ModelFileError(f"{CONFIG}: {FIELD}: {error}", field=error.field) from error
    return dict(found)
