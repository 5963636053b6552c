"""Weights in few bits: a third to a half of the bytes that each token of a large model has to read.

Only the language model's own attention and feed-forward layers are kept so, nearly all of its weights. Not
exact: what it costs is measured in `tests/unit/models/test_quantization.py` and reported in
docs/performance_results.md.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mm_interleaved.errors import ModelFileError, UsageError, escape
from mm_interleaved.spelling import hint

if TYPE_CHECKING:
    import torch

QUANTIZATIONS = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Kinds of weights and the library each needs. `int8`: one scale a row. `nf4`: four bits, 16 levels spread as
a normal distribution, one scale each 64 weights."""
AS_THEY_ARE = ["vision", "text_head", "image_decoder", "context_projection", r".*\.synchronizer\."]
"""Modules that stay: small, or read by attribute. A text is a prefix of names, or a regular expression."""


def check_installed(library: str, asked: str, field: str) -> None:
    """Refuses in one sentence what needs a library that is not there.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec(library) is None:
        raise UsageError(
            f"{asked} needs {library}, which is not installed; install mm-interleaved[quantize]", field=field
        )


def refuse_to_save(model: torch.nn.Module) -> None:
    """Refuses to write weights in few bits: neither library reads back what it writes of a model like ours.

    Raises:
        ModelFileError: names the library.
    """
    for parameter in model.parameters():
        library = type(parameter).__module__.split(".")[0]
        if library in QUANTIZATIONS.values():
            raise ModelFileError(
                f"this model's weights are kept in few bits by {library} and would not come back: copy the "
                "model that it was loaded from, and name the quantization whenever it is loaded"
            )


def weight_only(kind: str) -> Any:
    """The `quantization_config` of transformers' `from_pretrained` for one of `QUANTIZATIONS`.

    Raises:
        UsageError: there is no such kind, or its library is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise UsageError(
            f"quantization: found {escape(kind)!r}, {hint(kind, QUANTIZATIONS)}", field="quantization"
        )
    check_installed(QUANTIZATIONS[kind], f"quantization {kind}", "quantization")
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=AS_THEY_ARE
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=AS_THEY_ARE)
