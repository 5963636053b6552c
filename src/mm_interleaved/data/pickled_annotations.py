"""Published annotations that are pickles, read once and written as lines of JSON.

A pickle can name any function and have it called. Here it may name only what NumPy arrays, dictionaries and
byte strings need; anything else is refused before it is looked up. Nothing but `data convert` imports this
file, and no loader reads what it reads.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mm_interleaved.documents.strict_json import Field, FieldError, parse_strict
from mm_interleaved.errors import InputError, UsageError, escape
from mm_interleaved.tokens.boxes import four_numbers

_MAX_BYTES = 2 << 30
_MAX_DEPTH = 20
_NUM_FOLLOWING = 4
"""A story has five frames."""
_SPLITS = ("train", "val", "test")
_PORORO_NAMES = ("pororo", "loopy", "eddy", "harry", "poby", "tongtong", "crong", "rody", "petty")
_SETTINGS = {"split_by"}
_NPY_START = b"\x93NUMPY"


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What old protocols call to make bytes of a string."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
    return text.encode(encoding)


# The functions that NumPy's own pickles name, taken from where NumPy itself looks them up.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy.core.multiarray", "scalar"): _SCALAR,
        ("numpy._core.multiarray", "scalar"): _SCALAR,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
    }
)


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def read_pickled(path: Path) -> Any:
    """The contents of a `.npy`, `.pkl` or `.p` file as JSON values: lists, objects, strings, numbers.

    Raises:
        InputError: not there, damaged, too large, or naming anything that is not allowed.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: more than {_MAX_BYTES} bytes, expected an annotation file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _plain(_unpickled(data))
    except InputError:
        raise
    except Exception as error:
        # Damaged pickles raise nearly anything (EOFError, IndexError, MemoryError, ...).
        reason = escape(str(error)) or type(error).__name__
        raise InputError(f"{path}: refused or damaged ({reason})") from error


def _unpickled(data: bytes) -> Any:
    file = io.BytesIO(data)
    if not data.startswith(_NPY_START):
        return _AllowListUnpickler(file, encoding="latin1").load()
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of .npy, expected 1.0 or 2.0")
    dtype = read_header[version](file)[2]
    if dtype.hasobject:
        return _AllowListUnpickler(file, encoding="latin1").load()
    return np.load(io.BytesIO(data), allow_pickle=False)


def _plain(value: Any, depth: int = 0) -> Any:
    """The value in lists, dictionaries with string keys, strings, numbers, booleans and None."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(f"found {type(value).__name__}, expected plain values and arrays")


# The corpora


def _pororo(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """PororoSV: `descriptions.npy`, `img_cache4.npy`, `following_cache4.npy`, `train_seen_unseen_ids.npy`."""
    names = ("descriptions", "img_cache4", "following_cache4", "train_seen_unseen_ids")
    descriptions, firsts, following, splits = (
        Field(read_pickled(folder / f"{name}.npy"), f"{name}.npy") for name in names
    )
    first_images, following_images = firsts.list(), following.list()
    last = min(len(first_images), len(following_images)) - 1
    for split, ids in zip(_SPLITS, splits.list(), strict=False):
        for number in ids.list():
            index = number.integer(0, last)
            images = [item.text() for item in (first_images[index], *following_images[index].list())]
            frames = []
            for image in map(_path, images):
                caption = _first_text(descriptions[image.removesuffix(".png")])
                frames.append({"image": image, "caption": _named(caption)})
            yield {"id": f"pororosv-{split}-{index}", "split": split, "frames": frames}


def _first_text(captions: Field) -> str:
    """One caption, or the first of several."""
    if not isinstance(captions.value, list):
        return captions.text()
    return captions.list()[0].text() if captions.value else captions.wrong("at least one caption")


def _path(text: str) -> str:
    """A path; the published ones are Python's way of showing bytes: `b'folder/1.png'`."""
    is_shown = text.startswith(("b'", 'b"')) and text.endswith(("'", '"'))
    return text[2:-1] if is_shown else text


def _named(caption: str) -> str:
    """The characters' names with capitals, which the published captions lack."""
    words = caption.split()
    is_name = [word.strip(".,'\"").lower() in _PORORO_NAMES for word in words]
    return " ".join(word.capitalize() if named else word for word, named in zip(words, is_name, strict=True))


def _flintstones(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """FlintstonesSV: `following_cache4.pkl`, `train-val-test_split.json` and
    `flintstones_annotations_v1-0.json`.
    """
    following = Field(read_pickled(folder / "following_cache4.pkl"), "following_cache4.pkl")
    splits = _json(folder / "train-val-test_split.json")
    records = _json(folder / "flintstones_annotations_v1-0.json").list()
    captions = {record["globalID"].text(): record["description"].text() for record in records}
    for split in _SPLITS:
        for item in splits[split].list():
            name = item.text()
            followers = following[name].list() if name in following else []
            if len(followers) != _NUM_FOLLOWING:
                continue  # too near to the end of its episode to begin a story
            frames = []
            for frame in (item, *followers):
                if frame.text() not in captions:
                    frame.wrong("the globalID of an annotation")
                caption = " ".join(captions[frame.text()].split())
                frames.append({"image": f"{frame.text()}.png", "caption": caption})
            yield {"id": f"flintstonessv-{split}-{name}", "split": split, "frames": frames}


def _refer(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """RefCOCO as published: `instances.json` and `refs(...).p`, of which `split_by` chooses one."""
    refs = _chosen_refs(folder, settings.get("split_by"))
    instances = _json(folder / "instances.json")
    images = {str(image["id"].value): image for image in instances["images"].list()}
    annotations = {str(item["id"].value): item for item in instances["annotations"].list()}
    for ref in Field(read_pickled(refs), refs.name).list():
        image, annotation = images.get(str(ref["image_id"].value)), annotations.get(str(ref["ann_id"].value))
        if image is None or annotation is None:
            ref["ann_id"].wrong("an annotation and its image in instances.json")
        assert image is not None and annotation is not None
        left, top, width, height = four_numbers(annotation["bbox"])
        for sentence in ref["sentences"].list():
            yield {
                "image": image["file_name"].text(),
                "sent": sentence["sent"].text(),
                "bbox": [left, top, left + width, top + height],
                "width": image["width"].value,
                "height": image["height"].value,
                "split": ref["split"].text(),
            }


def _chosen_refs(folder: Path, split_by: str | None) -> Path:
    """The file of references: RefCOCO and RefCOCOg are published with two ways to split them."""
    found = {path.name.removeprefix("refs(").removesuffix(").p"): path for path in folder.glob("refs(*).p")}
    if split_by is None and len(found) == 1:
        return next(iter(found.values()))
    if split_by in found:
        return found[split_by]
    names = ", ".join(sorted(found)) or "none"
    if split_by is None and found:
        raise UsageError(
            f"{folder}: found refs(...).p split by {names}; choose one, such as --set split_by={max(found)}",
            field="split_by",
        )
    wanted = "refs(...).p" if split_by is None else f"refs({escape(str(split_by), 40)}).p"
    raise InputError(f"{folder}: there is no file {wanted}, found those split by {names}")


def _json(path: Path) -> Field:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    return Field(parse_strict(text, str(path)), path.name)


PICKLED: Mapping[str, Callable[[Path, Mapping[str, Any]], Iterator[dict[str, Any]]]] = MappingProxyType(
    {"pororosv-pickles": _pororo, "flintstonessv-pickles": _flintstones, "refcoco-pickles": _refer}
)
"""Published folders by the name of their form; each gives the lines of the source of that name."""


def unpickled_records(
    name: str, folder: Path, settings: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """The lines that a published folder becomes.

    Args:
        settings: `split_by` of RefCOCO: `unc`, `google` or `umd`, where the folder holds several.

    Raises:
        InputError: a file that is missing, damaged or wrong.
        UsageError: a setting that is not known, or that is needed.
    """
    unknown = set(settings) - (_SETTINGS if name == "refcoco-pickles" else set())
    if unknown:
        raise UsageError(f"{name}: there is no setting {escape(min(unknown), 40)!r}", field=min(unknown))
    try:
        yield from PICKLED[name](folder, settings)
    except FieldError as error:
        raise error.at(str(folder)) from error
