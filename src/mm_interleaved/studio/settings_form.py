"""The drawer of settings: what a person may change, beginning from the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.typed_settings import Choice, Range, field_hints, limits

_FEW = 10_000
"""A range that goes further is shown as a number without an end."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    label: str
    help: str
    step: float = 1


FORM: dict[str, tuple[_Entry, ...]] = {
    "Text": (
        _Entry("max_new_tokens", "Longest text", "Text tokens, all new texts together."),
        _Entry("do_sample", "Surprise", "Draw words by chance; off writes the likeliest."),
        _Entry("temperature", "Temperature", "Above 1 is bolder, below 1 is safer.", 0.05),
        _Entry("top_p", "Top p", "Draw from the likeliest words that hold this share.", 0.05),
        _Entry("top_k", "Top k", "Draw from this many of the likeliest words."),
        _Entry("repetition_penalty", "Repetition penalty", "Above 1 avoids words that were used.", 0.05),
    ),
    "Pictures": (
        _Entry("max_images", "Most pictures", "Where the model decides the layout."),
        _Entry("num_inference_steps", "Steps", "Denoising steps; more is finer and slower."),
        _Entry("guidance_scale", "Guidance", "How closely a picture follows the story; 1 is off.", 0.5),
        _Entry("scheduler", "Sampler", "How noise becomes a picture."),
        _Entry("num_candidates", "Best of", "Draw so many, keep the one the model ranks best."),
        _Entry("negative_prompt", "Not in the picture", "What pictures should not show."),
        _Entry("context_strength", "Likeness", "How strongly earlier pictures shape new ones.", 0.1),
        _Entry("height", "Height", "Pixels."),
        _Entry("width", "Width", "Pixels."),
    ),
    "Chance": (_Entry("seed", "Seed", "The same seed makes the same parts."),),
}


def settings_form(defaults: Mapping[str, Any], *, has_images: bool) -> list[dict[str, Any]]:
    """Groups of fields, each with its kind, range or choices, and the model's own value.

    Args:
        defaults: the model's own settings.
        has_images: whether the model generates images.
    """
    own, hints = GenerationSettings.combine(defaults), field_hints(GenerationSettings)
    bounds = limits(GenerationSettings)
    return [
        {
            "group": group,
            "fields": [_field(entry, getattr(own, entry.name), hints, bounds) for entry in entries],
        }
        for group, entries in FORM.items()
        if has_images or group != "Pictures"
    ]


def _field(entry: _Entry, own: Any, hints: Mapping[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    field: dict[str, Any] = {"name": entry.name, "label": entry.label, "help": entry.help, "own": own}
    bound = bounds.get(entry.name)
    if isinstance(bound, Choice):
        return field | {"kind": "choice", "choices": list(bound.names)}
    kind = str(hints[entry.name])
    if "bool" in kind:
        return field | {"kind": "switch"}
    if "str" in kind:
        return field | {"kind": "text"}
    is_whole = "int" in kind
    high = bound.high if isinstance(bound, Range) and bound.high <= _FEW else None
    low = bound.low if isinstance(bound, Range) else 0
    return field | {"kind": "number", "whole": is_whole, "low": low, "high": high, "step": entry.step}
