"""Documents that harnesses ask, answered in batches; and the answers as the strings that harnesses read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import MMInterleavedError, escape
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.generation.defaults import defaults_of
from mm_interleaved.generation.events import Failed, Finished
from mm_interleaved.generation.settings import settings_for

if TYPE_CHECKING:
    from mm_interleaved.generation import InterleavedGenerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One document to be answered."""

    document: Document
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings by name; the model's where not given."""
    until: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


def answer_all(
    generator: InterleavedGenerator, asked: Sequence[Asked], *, batch_size: int, quiet: bool = False
) -> list[tuple[Part, ...]]:
    """The parts of each answer, in order; `batch_size` documents at once, with progress unless `quiet`.

    Raises:
        MMInterleavedError: names the first document that could not be answered.
    """
    answers: dict[int, tuple[Part, ...]] = {}
    defaults = defaults_of(generator.model)
    with tqdm(total=len(asked), desc="mm-interleaved", unit="document", disable=quiet) as progress:
        for first in range(0, len(asked), batch_size):
            group = asked[first : first + batch_size]
            settings = [settings_for(each.document, defaults, each.settings) for each in group]
            for place, event in generator.stream_batch([each.document for each in group], settings):
                one = group[place]
                if isinstance(event, Finished):
                    generated = event.document.parts[len(one.document.parts) :]
                    answers[first + place] = cut_at(generated, one.until)
                    progress.update()
                elif isinstance(event, Failed):
                    raise named(event.error, one.document.id) from event.error
    return [answers[place] for place in range(len(asked))]


def named(error: MMInterleavedError, key: str) -> MMInterleavedError:
    """The same error, which says whose it is."""
    return type(error)(f"{escape(key)}: {error}", field=error.field)


def cut_at(parts: Sequence[Part], until: Sequence[str]) -> tuple[Part, ...]:
    """What stands before the first of some texts, in whichever text part it is."""
    kept: list[Part] = []
    for part in parts:
        if isinstance(part, Text):
            ends = [found for stop in until if (found := part.text.find(stop)) >= 0]
            if ends:
                return (*kept, replace(part, text=part.text[: min(ends)]))
        kept.append(part)
    return tuple(kept)


def text_of(parts: Sequence[Part]) -> str:
    """The texts, a line each."""
    texts = (part.text.strip() for part in parts if isinstance(part, Text))
    return "\n".join(text for text in texts if text)


def text_and_images(parts: Sequence[Part], folder: Path, key: str) -> str:
    """`{"text": ..., "images": [paths]}` as JSON, which tasks with images read; the images as PNG files.

    Which text stands before which image is lost, since no harness asks. A file's name has a hash of its
    content, so that no answer overwrites another's image.

    Args:
        folder: where images go, made if it is not there.
        key: the beginning of their names.
    """
    paths: list[str] = []
    for part in parts:
        if isinstance(part, Image):
            data = to_png(part.load())
            digest = hashlib.sha256(data).hexdigest()[:12]
            path = folder.absolute() / f"{file_name(key)}_{len(paths)}_{digest}.png"
            make_folder(path.parent)
            write_file(path, data)
            paths.append(str(path))
    return json.dumps({"text": text_of(parts), "images": paths}, ensure_ascii=False)


def file_name(key: str) -> str:
    """What of a key may stand in a file's name."""
    return re.sub(r"[^\w.-]", "_", key)[:120].lstrip(".") or "answer"
