"""What lmms-eval reads at its start, through the entry point `lmms_eval.models`: which class is our model.

Nothing heavy is imported: every run of lmms-eval reads this, whatever model it is for.
"""

from __future__ import annotations

from typing import Any

NAME = "mm_interleaved"
_MODULE = "mm_interleaved.evaluation.harnesses.lmms_eval_model"


def manifest() -> Any:
    """The `ModelManifest`: messages by default, context and visuals with `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME,
        simple_class_path=f"{_MODULE}.MMInterleavedSimple",
        chat_class_path=f"{_MODULE}.MMInterleavedChat",
        aliases=("mm-interleaved",),
    )
