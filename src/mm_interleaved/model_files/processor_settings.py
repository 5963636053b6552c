"""`processor_config.json`: what it may hold, and whether it belongs to a model; loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import ModelFileError, escape
from mm_interleaved.model_files.headers import read_json
from mm_interleaved.model_files.values import check_kinds, check_object

PROCESSOR_CONFIG = "processor_config.json"
SPECIAL_IDS = ("image_start", "image", "bos", "eos", "pad")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FIELDS: Mapping[str, Any] = {
    "image_size": int,
    "target_size": int | None,
    "num_slots": int,
    "resize": Literal["released", "clip"],
    "special_ids": dict,
}

_TOKEN = str | dict[str, Any] | None
_TOKENIZER_HINTS: Mapping[str, Any] = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
    **dict.fromkeys(("tokenizer_class", "backend", "padding_side", "truncation_side"), str | None),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), bool | None),
    "extra_special_tokens": list[Any] | dict[str, Any] | None,
    "model_max_length": int | float | None,
}


def read_processor_settings(folder: Path) -> dict[str, Any]:
    """The settings of a processor, each of `FIELDS` in them.

    Raises:
        ModelFileError: there is no such file, or a field of it is missing or wrong.
    """
    path = folder / PROCESSOR_CONFIG
    if not path.exists():
        raise ModelFileError(f"{path}: there is no such file, expected a processor's settings")
    settings = read_json(path)
    try:
        check_object(settings, FIELDS, "")
        missing = [name for name in FIELDS if name not in settings]
        if missing:
            raise FieldError(missing[0], f"missing, expected the fields {', '.join(FIELDS)}")
        _check_ids(settings["special_ids"])
    except FieldError as error:
        raise ModelFileError(f"{path}: {error}", field=error.path) from error
    return {name: settings[name] for name in FIELDS}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ModelFileError: its files are no JSON objects, or it cannot be made of them.
    """
    from transformers import AutoTokenizer

    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            try:
                check_kinds(read_json(folder / name), _TOKENIZER_HINTS, "")
            except FieldError as error:
                raise ModelFileError(f"{folder / name}: {error}", field=error.path) from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except MemoryError:
        raise
    except BaseException as error:
        # What is raised differs by the damage; a panic of the tokenizers' own code is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        known = (*TOKENIZER_FILES, "tokenizer.json", "tokenizer.model")
        files = ", ".join(name for name in known if (folder / name).is_file()) or "there are none"
        sentence = escape(" ".join(str(error).split()), limit=400)
        raise ModelFileError(
            f"{folder}: no tokenizer can be made of its files ({files}): {sentence}"
        ) from error


def refuse_other_model(
    settings: Mapping[str, Any], num_tokens: int, config: Mapping[str, Any], place: str
) -> None:
    """Refuses a processor that is not the model's: of other sizes, or with ids that the model does not know.

    Args:
        settings: each of `FIELDS`.
        num_tokens: one more than the largest id that the processor uses.
        config: of the model, as JSON.
        place: what is refused, for the message.

    Raises:
        ModelFileError: names the first field that differs.
    """
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    ids = settings["special_ids"]
    pairs = [
        ("image_size", settings["image_size"], "vision_config.image_size", vision.get("image_size")),
        ("num_slots", settings["num_slots"], "slot_resampler.num_queries", _num_slots(config)),
        *(
            (f"special_ids.{name}", ids[name], f"{name}_token_id", config.get(f"{name}_token_id"))
            # What rows are filled up with is never looked at.
            for name in SPECIAL_IDS
            if name != "pad"
        ),
    ]
    for field, found, of_model, expected in pairs:
        if expected is not None and found != expected:
            raise ModelFileError(
                f"{place}: {field}: found {found}, expected {expected} as {of_model} of the model has it",
                field=field,
            )
    size = text.get("vocab_size")
    if size is not None and num_tokens > size:
        raise ModelFileError(
            f"{place}: its tokenizer has ids up to {num_tokens - 1}, text_config.vocab_size of the model "
            f"is {size}",
            field="special_ids",
        )


def refuse_other_tokenizer(tokenizer: Any, ids: Mapping[str, int], place: str) -> None:
    """Refuses a tokenizer that begins and ends documents with other ids than a processor.

    Raises:
        ModelFileError: names the first token.
    """
    # Not the image tokens: a composed model has its own, whatever the tokenizer calls so.
    own = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    for name, found in own.items():
        if found is not None and found != ids[name]:
            raise ModelFileError(
                f"{place}: the tokenizer of another model: its {name}_token in tokenizer_config.json is "
                f"{found}, "
                f"special_ids.{name} of {PROCESSOR_CONFIG} is {ids[name]}",
                field=f"special_ids.{name}",
            )


def _num_slots(config: Mapping[str, Any]) -> Any:
    return (config.get("slot_resampler") or {}).get("num_queries")


def _check_ids(ids: Mapping[str, Any]) -> None:
    check_object(ids, dict.fromkeys(SPECIAL_IDS, int), "special_ids")
    for name in SPECIAL_IDS:
        if name not in ids:
            raise FieldError(f"special_ids.{name}", f"missing, expected {', '.join(SPECIAL_IDS)}")
    for name in ids:
        if name not in SPECIAL_IDS:
            raise FieldError(f"special_ids.{name}", f"no such id, expected {', '.join(SPECIAL_IDS)}")
