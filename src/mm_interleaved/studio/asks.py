"""What the page asks of the model, as documents that the engine continues.

    {"kind": "continue"} | {"kind": "again", "part": 2, ...} -> Lane, Lane, ...

A lane is one document to be continued, or one part of it to be made again; candidates are lanes side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.redo import AGAIN, KEEP, RESTS, another_seed, check_redo
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.serving.settings import Limits
from mm_interleaved.spelling import guess

CONTINUE, REDO, FOLLOW = "continue", "again", "follow"
KINDS = (CONTINUE, REDO, FOLLOW)
"""Go on at the end; make one part again; make again what was generated behind an edited part."""
MAX_CANDIDATES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One way in which the document shall go on."""

    document: Document
    part: int | None
    """The part that is made again; None: the document is continued at its end."""
    rest: str
    """What becomes of the parts behind it, see `generation.redo.RESTS`."""
    settings: GenerationSettings
    """Complete."""
    given: Mapping[str, Any]
    """Those of them that were asked for, which the session remembers."""

    @property
    def start(self) -> int:
        """The place of the first part that is made."""
        return len(self.document.parts) if self.part is None else self.part


def lanes(session: Session, ask: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Lane]:
    """The lanes of what was asked.

    Args:
        ask: `kind`, one of `KINDS`; `part`; `rest`; `candidates`, how many side by side; `settings` by name,
            over the document's own.
        defaults: the model's own settings.

    Raises:
        UsageError: something is asked that cannot be.
        InputError: the document's own settings are wrong.
    """
    kind, count, given = _kind(ask), _candidates(ask), _given(ask)
    document, part, rest = session.document, None, KEEP
    if kind == REDO:
        part, rest = _part(ask), ask.get("rest", KEEP)
        check_redo(document, part, rest)
    elif kind == FOLLOW:
        part = _first_generated(document, _part(ask))
        rest = AGAIN
    if part is not None and isinstance(document.parts[part], Text):
        given = _sampled(given, {**defaults, **document.generation})
    start = len(document.parts) if part is None else part
    attempts = len(session.alternatives(start).nodes)
    own = _without_missing_images(document, len(document.branched(start).images))
    if kind == FOLLOW and part is not None:
        # What follows an edit is made with the seed it had: it differs by the edit alone.
        attempts = 0
    elif "seed" in given:
        attempts = 0
    settings = settings_for(own, defaults, given)
    seeds = [
        settings.seed if n == 0 else another_seed(settings.seed, n) for n in range(attempts, attempts + count)
    ]
    return [
        Lane(
            document=document,
            part=part,
            rest=rest,
            settings=GenerationSettings.combine(settings.to_dict(), {"seed": seed}),
            given={**given, "seed": seed},
        )
        for seed in seeds
    ]


def check_limits(lane: Lane, limits: Limits, image_size: tuple[int, int]) -> None:
    """Refuse what a server refuses.

    Args:
        image_size: height and width that the model generates where nothing else is asked for.

    Raises UsageError, naming the setting.
    """
    settings = lane.settings
    height, width = settings.height or image_size[0], settings.width or image_size[1]
    bounds = {
        "max_new_tokens": (settings.max_new_tokens, limits.new_tokens),
        "num_candidates": (settings.num_candidates, limits.new_images),
        "num_inference_steps": (settings.num_inference_steps, limits.inference_steps),
        "num_beams": (settings.num_beams, limits.beams),
        "height": (height * width, limits.output_pixels),
    }
    for name, (found, most) in bounds.items():
        if found > most:
            raise UsageError(f"{name}: found {found}, expected at most {most} in the studio", field=name)
    characters = sum(len(part.text) for part in lane.document.parts if isinstance(part, Text))
    if characters > limits.characters:
        raise UsageError(
            f"the texts have {characters} characters, expected at most {limits.characters}", field="text"
        )


def _kind(ask: Mapping[str, Any]) -> str:
    kind = ask.get("kind")
    if kind not in KINDS:
        names = ", ".join(KINDS)
        raise UsageError(f"kind: found {escape(repr(kind))}, expected {names}", field="kind")
    rest = ask.get("rest", KEEP)
    if rest not in RESTS:
        hint = guess(rest, RESTS) if isinstance(rest, str) else ""
        raise UsageError(f"rest: found {escape(repr(rest))}, expected {', '.join(RESTS)}{hint}", field="rest")
    return kind


def _candidates(ask: Mapping[str, Any]) -> int:
    count = ask.get("candidates", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CANDIDATES:
        raise UsageError(
            f"candidates: found {escape(repr(count))}, expected 1 to {MAX_CANDIDATES}", field="candidates"
        )
    return count


def _given(ask: Mapping[str, Any]) -> dict[str, Any]:
    given = ask.get("settings", {})
    if not isinstance(given, Mapping):
        raise UsageError("settings: expected settings by name", field="settings")
    return {name: value for name, value in given.items() if value is not None}


def _part(ask: Mapping[str, Any]) -> int:
    part = ask.get("part")
    if isinstance(part, bool) or not isinstance(part, int):
        raise UsageError(f"part: found {escape(repr(part))}, expected a whole number", field="part")
    return part


def _first_generated(document: Document, part: int) -> int | None:
    """The first part behind `part` that was generated; None where there is none: go on at the end."""
    places = [place for place, each in enumerate(document.parts) if each.generated and place > part]
    return places[0] if places else None


def _sampled(given: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Text that is made again is sampled unless somebody says otherwise: the likeliest stays the same."""
    if "do_sample" in given or "num_beams" in given:
        return given
    if before.get("do_sample") is not None and before["do_sample"]:
        return given
    return {**given, "do_sample": True, "num_beams": 1, "prompt_lookup_num_tokens": None}


def _without_missing_images(document: Document, count: int) -> Document:
    """Without indices of earlier images that come later than where the document goes on."""
    chosen = document.generation.get("context_images")
    words = chosen.split(",") if isinstance(chosen, str) else []
    if not words or not all(word.strip().isdecimal() for word in words):
        return document
    left = [word.strip() for word in words if int(word) < count]
    others = {name: value for name, value in document.generation.items() if name != "context_images"}
    return replace(document, generation={**others, "context_images": ",".join(left)} if left else others)
