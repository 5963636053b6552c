"""A harness' names for how to generate, as generation settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from mm_interleaved.documents.layout import IMAGE, TEXT, parse_layout
from mm_interleaved.errors import escape
from mm_interleaved.generation.settings import GenerationSettings

logger = logging.getLogger(__name__)

IMAGE_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "ueval": "auto",
        "uni_mmmu": "auto",
        "gedit_bench": "I",
        "imgedit": "I",
        "kris_bench": "I",
        "structeditbench": "I",
        "babyvision_gen": "I",
        "WISE": "I",
    }
)
"""Tasks of lmms-eval (0.7.3) that read `{"text", "images"}`, each with the layout of what it wants: one
image, or what the model likes. All others want text alone.
"""
_NAMES = frozenset(field.name for field in fields(GenerationSettings))
_SAMPLING = ("temperature", "top_p", "top_k")
_HANDLED = frozenset({"until", "visual_cot", *_SAMPLING})
_SAID: set[str] = set()


def layout_of_task(task: str) -> str:
    """The layout that a task of lmms-eval wants, if nobody says another; subtasks are `<task>_<name>`."""
    found = (layout for name, layout in IMAGE_TASKS.items() if task == name or task.startswith(f"{name}_"))
    return next(found, TEXT)


def wants_images(layout: str) -> bool:
    """Whether an answer of this layout may hold images."""
    letters = parse_layout(layout)
    return letters is None or IMAGE in letters


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings by name.

    Sampling is on where `do_sample` says so, or says nothing while `temperature` is above 0; a temperature or
    a `top_p` of 0 is greedy, as harnesses mean it. What is None counts as not given. Names that are no
    settings of ours are left out, with a warning, once each.
    """
    known = {name: value for name, value in given.items() if value is not None}
    asked = known.pop("do_sample", None)
    temperature, top_p = known.get("temperature"), known.get("top_p")
    is_sampled = bool(temperature) if asked is None else bool(asked)
    is_sampled = is_sampled and temperature != 0 and top_p != 0
    settings = {name: value for name, value in known.items() if name in _NAMES - _HANDLED}
    settings["do_sample"] = is_sampled
    if is_sampled:
        settings |= {name: known[name] for name in _SAMPLING if name in known}
    for name in sorted(known.keys() - _NAMES - _HANDLED - _SAID):
        _SAID.add(name)
        logger.warning("%s is no generation setting of this model and is left out", escape(name))
    return settings


def stop_texts(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of `until`, at the first of which an answer ends."""
    until = given.get("until")
    texts = [until] if isinstance(until, str) else until or ()
    return tuple(text for text in texts if text)
