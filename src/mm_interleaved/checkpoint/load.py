"""A saved model in, a built one out; what does not fit is named before a weight is read.

transformers' `from_pretrained` works too; it fills gaps with fresh weights, where this refuses them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import MMInterleavedError, ModelFileError, StorageError, escape, memory_wanted
from mm_interleaved.model_files.config import read_own_config
from mm_interleaved.model_files.headers import read_json, tensor_headers
from mm_interleaved.model_files.resolve import CONFIG
from mm_interleaved.model_files.values import check_kinds, check_object
from mm_interleaved.models.config import BASE_HINTS, MMInterleavedConfig
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATION_CONFIG = "generation_config.json"
_MAX_NAMED = 10
_NUMBER = int | float | None
_ID = int | list[int] | None
_GENERATION_HINTS: Mapping[str, Any] = {
    **dict.fromkeys(("do_sample", "output_attentions", "output_hidden_states", "use_cache"), bool | None),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"), _ID),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "length_penalty"), _NUMBER),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_new_tokens", "num_beams", "top_k"), int | None),
    **dict.fromkeys(("cache_implementation", "transformers_version"), str | None),
    "_from_model_config": bool,
}


def load_model(
    folder: Path | str,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    allow_missing: Sequence[str] = (),
    **settings: Any,
) -> MMInterleavedForConditionalGeneration:
    """The model of a folder that `save_pretrained` or `convert` wrote, in evaluation mode.

    Args:
        dtype: "auto" (as saved), "float32", "bfloat16", "float16", or a torch dtype.
        device_map: as transformers: None, "auto", a device, or a device for each module.
        allow_missing: patterns (`*` stands for anything) of tensors that may start fresh.
        settings: further arguments of transformers' `from_pretrained`.

    Raises:
        ModelFileError: the folder holds no whole model of ours.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    _check_generation_config(folder)
    headers = tensor_headers(folder)
    found = {name: header.shape for name, header in headers.items()}

    def check(model: Any) -> None:
        # Between building and reading, so that the model is built once.
        if model.image_decoder is not None:
            _check_scheduler(folder / CONFIG, model)
        expected = _shapes_of(model)
        part = _part_that_differs(expected, found)
        refuse_unfit(f"{folder} (config.json: {part})", expected, found, allow_missing=allow_missing)

    with model_file_errors(folder), _building_errors(folder / CONFIG):
        model = MMInterleavedForConditionalGeneration.read_pretrained(
            folder, config=config, dtype=dtype, device_map=device_map, when_built=check, **settings
        )
    return model.eval()


def read_model_config(folder: Path) -> MMInterleavedConfig:
    """The configuration of a model folder, from which a model can be built. Raises ModelFileError."""
    path = folder / CONFIG
    settings = read_own_config(folder)
    if "auto_map" in settings:
        raise ModelFileError(f"{path}: asks for code of its own (auto_map), which is never run")
    if settings.get("quantization_config") is not None:
        raise ModelFileError(
            f"{path}: quantization_config: weights saved in few bits are not read; name the quantization "
            "when whole weights are loaded",
            field="quantization_config",
        )
    try:
        check_object(settings, BASE_HINTS, "")
        return MMInterleavedConfig.from_dict(settings)
    except FieldError as error:
        raise ModelFileError(f"{path}: {error}", field=error.path) from error
    except Exception as error:  # the libraries' own checks raise by a dozen kinds
        field = _culprit(settings, MMInterleavedConfig.from_dict)
        raise ModelFileError(
            f"{path}: {field}: not a valid value ({one_line(error)})", field=field
        ) from error


def model_shapes(config: MMInterleavedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model; nothing is allocated.

    Raises:
        ModelFileError: the configuration describes no model.
    """
    return dict(_model_shapes(config.to_json_string(use_diff=False)))


@lru_cache(maxsize=4)
def _model_shapes(config: str) -> dict[str, tuple[int, ...]]:
    # Building the modules takes seconds at full size, and a conversion asks for one model more than once.
    with model_file_errors("configuration"), torch.device("meta"):
        model = MMInterleavedForConditionalGeneration(MMInterleavedConfig.from_dict(json.loads(config)))
    return _shapes_of(model)


def _shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def refuse_unfit(
    place: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    allow_missing: Sequence[str] = (),
) -> None:
    """Refuse tensors that do not fit a model, naming the first ten of each kind. Raises ModelFileError."""
    missing = [
        name
        for name in sorted(expected.keys() - found.keys())
        if not any(fnmatchcase(name, pattern) for pattern in allow_missing)
    ]
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} (expected {expected[name]}, found {found[name]})"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    refuse_names(place, missing=missing, unexpected=unexpected, misshapen=misshapen)


def refuse_names(place: str, **names_by_kind: Iterable[str]) -> None:
    """Refuse tensors by name, e.g. `missing=[...]`, unless there are none. Raises ModelFileError."""
    problems = []
    for kind, names in names_by_kind.items():
        names = [escape(name) for name in names]
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            problems.append(f"{len(names)} {kind} tensors: {', '.join(names[:_MAX_NAMED])}{more}")
    if problems:
        raise ModelFileError(f"{place}: does not fit the model; {'; '.join(problems)}")


# Which part of a configuration says what size tensors have, by the beginning of their names.
_PARTS_BY_NAME = {
    "vision.clip": "vision_config",
    "vision.adapter": "adapter",
    "vision.resampler": "slot_resampler",
    "image_decoder.resampler": "conditioning_resampler",
    "image_decoder.synchronizers": "image_synchronizer",
    "image_decoder.unet": "unet_config",
    "image_decoder.vae": "vae_config",
}


def _part_that_differs(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """The part of a configuration that most tensors disagree with."""
    parts: Counter[str] = Counter()
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            by_name = [part for start, part in _PARTS_BY_NAME.items() if name.startswith(start)]
            text = "text_synchronizer" if ".synchronizer." in name else "text_config"
            parts[by_name[0] if by_name else text] += 1
    return parts.most_common(1)[0][0] if parts else "text_config"


def _check_scheduler(path: Path, model: Any) -> None:
    """Refuses a noise schedule that cannot be made, before any text is generated."""
    try:
        steps = model.training_scheduler
    except Exception as error:  # diffusers checks little by itself: what is raised differs by the value
        raise ModelFileError(f"{path}: scheduler_config: no noise schedule ({one_line(error)})") from error
    if not bool(torch.isfinite(steps.alphas_cumprod).all()):
        raise ModelFileError(f"{path}: scheduler_config: its noise schedule holds no finite numbers")


@contextmanager
def _building_errors(path: Path):
    """What does not fit together is the fault of the configuration."""
    try:
        yield
    except FieldError as error:
        raise ModelFileError(f"{path}: {error}", field=error.path) from error


def _culprit(settings: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]) -> str:
    """The field without which something can be made of settings; the whole, if it is none alone."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            for inner in value:
                if _is_made(make, {**settings, name: {k: v for k, v in value.items() if k != inner}}):
                    return f"{name}.{inner}"
        if _is_made(make, {k: v for k, v in settings.items() if k != name}):
            return name
    return "its fields together"


def _is_made(make: Callable[[dict[str, Any]], Any], settings: dict[str, Any]) -> bool:
    try:
        make(settings)
    except Exception:  # as above; that it fails is the answer
        return False
    return True


def _check_generation_config(folder: Path) -> None:
    """Refuses a `generation_config.json` of which transformers makes nothing, or something that fails later.

    Raises:
        ModelFileError: names the field.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return
    settings = read_json(path)
    try:
        check_kinds(settings, _GENERATION_HINTS, "")
        _made_generation_config(settings)
    except FieldError as error:
        raise ModelFileError(f"{path}: {error}", field=error.path) from error
    except Exception as error:  # transformers checks these by a dozen kinds
        field = _culprit(settings, _made_generation_config)
        raise ModelFileError(
            f"{path}: {field}: not a valid value ({one_line(error)})", field=field
        ) from error


def _made_generation_config(settings: dict[str, Any]) -> None:
    made = GenerationConfig.from_dict(dict(settings))
    made.validate()
    made.to_json_string()


def one_line(error: Exception) -> str:
    """What an exception says, in one line that is safe to show."""
    return escape(" ".join(str(error).split()) or type(error).__name__, limit=400)


@contextmanager
def model_file_errors(place: Path | str):
    """Turn what libraries raise over model files into one sentence; a memory that is full is no fault of
    theirs, and a StorageError.
    """
    try:
        yield
    except MMInterleavedError:
        raise
    except FieldError as error:
        raise ModelFileError(f"{place}: {error}", field=error.path) from error
    except (MemoryError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if (wanted := memory_wanted(error)) is not None:
            raise StorageError(f"{place}: the model cannot be loaded: {wanted}") from error
        raise ModelFileError(f"{place}: the model cannot be loaded ({one_line(error)})") from error
