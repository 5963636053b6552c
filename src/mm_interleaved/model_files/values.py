"""Whether the values of a model's JSON files are of the kind and size that their fields are for.

Kinds come from the annotations of the classes that the values are for; what a number may be comes from the
tables below. Nothing is built: a damaged field is named before anything large is made. Loads no torch.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from mm_interleaved.documents.strict_json import FieldError, describe
from mm_interleaved.errors import escape

_LARGEST = 10**12
_LARGEST_SIZE = 2**24
_LONGEST_TEXT = 10_000

SIZES: Mapping[str, int] = types.MappingProxyType(
    dict.fromkeys(
        (
            "addition_embed_type_num_heads", "attention_head_dim", "base_size", "block_out_channels",
            "conv_in_kernel", "conv_out_kernel", "cross_attention_dim", "cross_attention_every", "dim",
            "every", "head_dim", "hidden_size", "in_channels", "intermediate_size", "latent_channels",
            "max_images",
            "max_position_embeddings", "mlp_dim", "norm_num_groups", "num_attention_heads", "num_channels",
            "num_heads", "num_key_value_heads", "num_points", "num_queries", "num_slots", "out_channels",
            "patch_size", "projection_dim", "stem_dim", "value_dim", "vocab_size",
        ),
        _LARGEST_SIZE,
    )
    | dict.fromkeys(("image_size", "target_size", "sample_size"), 2**14)
    | dict.fromkeys(("num_hidden_layers", "num_layers", "num_interactions"), 2**10)
    | dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), 2**6)
    | {"num_train_timesteps": 2**20, "max_position_embeddings": 2**27}
)  # fmt: skip
"""Fields that count something, at least one, and the most that any model has."""
COUNTS: Mapping[str, int] = types.MappingProxyType(
    {
        "levels": 3,
        "steps_offset": 2**7,
        "num_extra_extractors": 2**10,
        "pixel_levels": 3,
        "num_new_tokens": _LARGEST_SIZE,
    }
)
"""The same from 0."""
SHARES = ("attention_dropout", "beta_end", "beta_start", "condition_dropout", "dropout")
"""From 0 to 1."""
POSITIVE = (
    "feed_forward_ratio", "layer_norm_eps", "mid_block_scale_factor", "norm_eps",
    "resnet_out_scale_factor", "rms_norm_eps", "rope_theta", "scaling_factor", "value_ratio",
)  # fmt: skip
NOT_NEGATIVE = (
    "image_loss_weight", "initializer_factor", "initializer_range", "offset_spread",
    "text_loss_weight",
)  # fmt: skip
_NUMBERS = frozenset({*SIZES, *COUNTS, *SHARES, *POSITIVE, *NOT_NEGATIVE})


def check_object(value: Any, hints: Mapping[str, Any], path: str) -> None:
    """Refuses an object one of whose values is not what its field is for.

    Args:
        hints: type of each field; values of other names are only looked through for numbers that are none.
        path: of the object, for messages; empty for the whole file.

    Raises:
        FieldError: a ValueError that names the first of them.
    """
    check_kinds(value, hints, path)
    for name, item in value.items():
        check_numbers(name, item, f"{path}.{name}" if path else str(name))


def check_kinds(value: Any, hints: Mapping[str, Any], path: str) -> None:
    """The same, without a look at how large numbers are."""
    if not isinstance(value, Mapping):
        _refuse(path, value, "an object")
    for name, item in value.items():
        if name in hints and not fits(item, hints[name]):
            _refuse(f"{path}.{name}" if path else str(name), item, _words(hints[name]))


def fits(value: Any, hint: Any) -> bool:
    """A JSON value can stand for a value of a type; types that JSON does not have are not judged."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    kind = origin or hint
    if kind in (None, type(None)):
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind in (list, tuple, Sequence):
        items = [each for each in arguments if each is not Ellipsis]
        return isinstance(value, (list, tuple)) and (not items or all(fits(v, items[0]) for v in value))
    if kind is dict or kind is Mapping or typing.is_typeddict(kind):
        return isinstance(value, Mapping)
    return True


def check_numbers(name: str, value: Any, path: str) -> None:
    """Refuses numbers, anywhere below a field, that are none, or none that the field can have."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_numbers(key, item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_numbers(name, item, f"{path}[{index}]")
    elif isinstance(value, (str, bool)):
        if name in _NUMBERS:
            _refuse(path, value, _range_of(name)[2])
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            _refuse(path, value, f"at most {_LONGEST_TEXT} characters")
    elif isinstance(value, (int, float)):
        if value != value or abs(value) > _LARGEST:
            _refuse(path, value, f"a finite number of at most {_LARGEST}")
        low, high, words = _range_of(name)
        if not low <= value <= high:
            _refuse(path, value, words)


def _range_of(name: str) -> tuple[float, float, str]:
    """What numbers a field can have: least, most, in words."""
    if name in SIZES:
        return 1, SIZES[name], f"a number from 1 to {SIZES[name]}"
    if name in COUNTS:
        return 0, COUNTS[name], f"a number from 0 to {COUNTS[name]}"
    if name in SHARES:
        return 0, 1, "a number from 0 to 1"
    if name in POSITIVE:
        return math.ulp(0.0), math.inf, "a number above 0"
    if name in NOT_NEGATIVE:
        return 0, math.inf, "a number of at least 0"
    if name.endswith("_token_id"):
        # Some configurations of Llama pad with -1.
        return -1, _LARGEST_SIZE, "the number of a token"
    return -math.inf, math.inf, ""


def _refuse(path: str, value: Any, expected: str) -> NoReturn:
    raise FieldError(path, f"found {describe(value)}, expected {expected}")


def _words(hint: Any) -> str:
    """A type as a user of JSON would call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in arguments))
    if origin is Literal:
        return " or ".join(escape(repr(each)) for each in arguments)
    if origin is typing.Annotated:
        return _words(arguments[0])
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        items = [each for each in arguments if each is not Ellipsis]
        return f"a list, each {_words(items[0])}" if items else "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return "null" if kind in (None, type(None)) else names.get(kind, "an object")
