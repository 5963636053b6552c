"""Sources by name, for settings and for the command line; and which one a file is for.

To add a source:
1. a file in `sources/`: a frozen, keyword-only dataclass with `paths`, `shards()` and `read()` (see
   `source`), which makes its items by `attempt`; each field states its type, its range and its help;
2. a line in `SOURCES` below, and in `_name_of_record` the fields that its records are recognised by;
3. a sample in `tests/unit/data/test_source_rules.py` (`SAMPLES`), on which all rules for sources are tried;
4. a row in the table of `docs/data.md`.
The tests fail as long as 3 or 4 is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mm_interleaved.data.source import Source
from mm_interleaved.data.sources.ade20k import SegmentationPairs
from mm_interleaved.data.sources.captions import CaptionTables
from mm_interleaved.data.sources.documents import DocumentFiles
from mm_interleaved.data.sources.flickr30k_entities import Flickr30kEntities
from mm_interleaved.data.sources.frame_strips import FrameStripStories
from mm_interleaved.data.sources.laion import PairLines
from mm_interleaved.data.sources.mmc4 import MMC4
from mm_interleaved.data.sources.obelics import ObelicsTables
from mm_interleaved.data.sources.paragraphs import Paragraphs
from mm_interleaved.data.sources.refcoco import ReferringExpressions
from mm_interleaved.data.sources.storyworld import StoryWorldSource
from mm_interleaved.data.sources.visdial import VisualDialogues
from mm_interleaved.data.sources.vist import VisualStories
from mm_interleaved.data.sources.vqa import VisualQuestions
from mm_interleaved.data.sources.webdataset import PairTars
from mm_interleaved.data.storage.files import name_of
from mm_interleaved.data.storage.records import first_record, whole_table
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.spelling import hint
from mm_interleaved.typed_settings import field_hints, from_json

# LLaVA's and OBELICS' lines are two of the many forms of record that documents have.
SOURCES: Mapping[str, type[Any]] = MappingProxyType(
    {
        "documents": DocumentFiles,
        "llava": DocumentFiles,
        "mmc4": MMC4,
        "laion": PairLines,
        "webdataset": PairTars,
        "obelics": ObelicsTables,
        "captions": CaptionTables,
        "paragraphs": Paragraphs,
        "vqa": VisualQuestions,
        "visdial": VisualDialogues,
        "refcoco": ReferringExpressions,
        "flickr30k-entities": Flickr30kEntities,
        "ade20k": SegmentationPairs,
        "vist": VisualStories,
        "pororosv": FrameStripStories,
        "flintstonessv": FrameStripStories,
        "storyworld": StoryWorldSource,
    }
)


def make_source(name: str, settings: Mapping[str, Any], *, run_seed: int | None = None) -> Source:
    """The source of a name with its settings; a list stands for a tuple, a prompt is given by name.

    Args:
        run_seed: of a training run; a source that draws its documents takes it where it is given no other.

    Raises:
        UsageError: a name that is not known (the nearest one is suggested), a value of a wrong kind.
    """
    kind = SOURCES.get(name)
    if kind is None:
        raise UsageError(f"source: {_unknown(name, SOURCES)}", field="source")
    hints = field_hints(kind)
    given: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise UsageError(f"source {name}: {_unknown(key, hints)}", field=key)
        given[key] = from_json(value, hints[key], f"source {name}: {key}", field=key)
    if "paths" in hints and "paths" not in given:
        raise UsageError(f"source {name}: paths: missing, expected files, globs or addresses", field="paths")
    if run_seed is not None and getattr(kind, "takes_run_seed", False):
        given.setdefault("seed", run_seed)
    return kind(**given)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    return f"found {escape(name, 60)!r}, {hint(name, known)}"


def source_name_of(path: str) -> str:
    """Which source a file is for, by its name and its first record.

    Raises:
        UsageError: the form of the file is none of those known.
    """
    lower = name_of(path).lower()
    for suffix, name in ((".tar", "webdataset"), (".parquet", "obelics")):
        if lower.endswith(suffix):
            return name
    record = first_record(path)
    if record is None:
        # What is wrong with it is reported when it is read.
        return "documents"
    found = _name_of_record(set(record.value) if isinstance(record.value, dict) else set(), lower)
    if found == "table":
        found = _name_of_table(path)
    return found


def _name_of_record(keys: set[str], path: str) -> str:
    """By the fields of the first record of a list or of lines, or of the object that the file is."""
    known = (
        ({"text_list", "image_info"}, "mmc4"),
        ({"image", "sent", "bbox"}, "refcoco"),
        ({"frames"}, "pororosv"),
        ({"image_id", "url", "paragraph"}, "paragraphs"),
        ({"image", "question"}, "vqa"),
        ({"questions"}, "vqa"),
        ({"annotations"}, "table"),
        ({"data"}, "table"),
        ({"images", "info"}, "table"),
    )
    is_json = path.endswith((".json", ".json.gz"))
    for fields_needed, name in known:
        # Tables are read whole; a line with such fields is a record of another form.
        if fields_needed <= keys and (is_json or name not in ("vqa", "table", "paragraphs")):
            return name
    if keys == {"image_id", "caption"}:
        return "ade20k"
    if path.endswith((".txt", ".txt.gz")):
        return "laion"
    if {"image", "caption"} <= keys and is_json:
        return "captions"
    return "documents"


def _name_of_table(path: str) -> str:
    try:
        table = whole_table(path).value
    except InputError:
        return "documents"
    if not isinstance(table, dict):
        return "documents"
    data, annotations = table.get("data"), table.get("annotations")
    if data is not None:
        return "visdial" if isinstance(data, dict) else "vqa"
    if isinstance(annotations, dict):
        return "vist"
    entries = annotations[:2] if isinstance(annotations, list) else []
    keys = {key for entry in entries if isinstance(entry, dict) for key in entry}
    if "story" in keys or any(isinstance(entry, list) for entry in entries):
        return "vist"
    if "bbox" in keys:
        return "refcoco"
    return "captions" if "images" in table else "paragraphs"
