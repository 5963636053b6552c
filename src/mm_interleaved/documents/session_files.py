"""A session on disk: `session.json` and `images/`, written whole or not at all, read as far as whole.

`session.json` is a record of the canonical form, so that whoever reads documents reads the one that is shown;
its field `session` holds the tree of all alternatives. Images are named by the hash of their bytes: no file
that an earlier state names is ever overwritten, and a saving that is killed leaves the state before it. Each
node and each field stands on a line of its own, so that a damaged file loses no more than its damaged lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mm_interleaved.documents.image_references import ImageFolder
from mm_interleaved.documents.images import image_suffix, read_regular_file, upright_size
from mm_interleaved.documents.layout import canonical_layout
from mm_interleaved.documents.part_tree import ROOT, Node, PartTree
from mm_interleaved.documents.parts import Image, Part, part_record
from mm_interleaved.documents.record_files import MAX_RECORD_BYTES
from mm_interleaved.documents.record_parts import content_parts
from mm_interleaved.documents.strict_json import Field, FieldError, describe, parse_strict
from mm_interleaved.errors import ImageError, InputError, UsageError, escape
from mm_interleaved.files import is_regular_file, make_folder, write_file

SESSION = "session.json"
FORMAT = "mm-interleaved session 1"
_IMAGES = "images"
_HASH_DIGITS = 24
_HEAD = ("id", "layout", "generation", "meta")


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What a session's file holds."""

    head: Mapping[str, Any]
    """What the document is besides its parts: those of `id`, `layout`, `generation`, `meta` and `target`
    that are there."""
    tree: PartTree
    losses: tuple[str, ...] = ()
    """What was there and could not be read: a sentence each. Empty: all is whole."""


def session_file(path: str | Path) -> Path:
    """The file of a session that is named by its folder or its file."""
    path = Path(path)
    return path / SESSION if os.path.isdir(path) else path


class SessionFolder:
    """A folder that one session is saved to, again and again: an image that has been written is not encoded
    once more.

    Raises StorageError (from `save`): the folder cannot be written; what was saved before stays as it was.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # The image itself is kept, so that no other can have its identity.
        self._written: dict[int, tuple[Image, str]] = {}

    def save(self, head: Mapping[str, Any], tree: PartTree) -> Path:
        """Writes the images that are new, then `session.json`, which is returned.

        Args:
            head: fields of the document, see `SavedSession`; `target` as parts.

        Raises ImageError: an image that is nowhere else cannot be read; nothing is changed then.
        """
        make_folder(self.path / _IMAGES)
        images = [self._place(node.part) for node in tree.nodes]
        nodes = [
            {"node": number, "after": node.parent, **part_record(node.part, image)}
            | ({"settings": dict(node.settings)} if node.settings else {})
            for number, (node, image) in enumerate(zip(tree.nodes, images, strict=True))
        ]
        shown = [part_record(tree.nodes[node].part, images[node]) for node in tree.path]
        fields = {name: _json(head[name]) for name in _HEAD if head.get(name)}
        fields["content"] = _lines(shown)
        session = {
            "format": _json(FORMAT),
            "chosen": _json(sorted(tree.chosen.items())),
            "past": _json(tree.past),
            "future": _json(tree.future),
            "nodes": _lines(nodes),
        }
        fields["session"] = _object(session)
        if head.get("target"):
            fields["target"] = _lines([part_record(part, self._place(part)) for part in head["target"]])
        path = self.path / SESSION
        # Half of a surrogate pair is no UTF-8; as an escape it is JSON still.
        write_file(path, f"{_object(fields)}\n".encode("utf-8", "backslashreplace"))
        return path

    def _place(self, part: Part) -> str:
        """Where an image's file stands, written now if it is not there yet; empty for a text."""
        if not isinstance(part, Image):
            return ""
        _, name = self._written.get(id(part), (None, None))
        if name is not None and is_regular_file(self.path / name):
            return name
        data = part.encoded()
        digest = hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]
        name = f"{_IMAGES}/{digest}{image_suffix(data) or '.bin'}"
        if not is_regular_file(self.path / name) or _hash_of(self.path / name) != digest:
            write_file(self.path / name, data)
        self._written[id(part)] = part, name
        return name


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(map(_json, records)) + "\n]" if records else "[]"


def _object(fields: Mapping[str, str]) -> str:
    return "{\n" + ",\n".join(f"{_json(name)}: {value}" for name, value in fields.items()) + "\n}"


def _hash_of(path: Path) -> str:
    return hashlib.sha256(read_regular_file(path)).hexdigest()[:_HASH_DIGITS]


# ---- Reading -------------------------------------------------------------------------------------------


def read_session(path: str | Path, image_root: str | Path | None = None) -> SavedSession:
    """A session as far as it is whole; what is lost is said, and its place among the parts is closed.

    Args:
        path: of `session.json`, or of its folder.
        image_root: folder that bounds all image paths; the file's own folder by default.

    Raises:
        InputError: there is no such file, it is of another format or version, or nothing in it is whole.
    """
    path = session_file(path)
    losses: list[str] = []
    record = _record_of(path, losses)
    session = record.get("session")
    given = session.get("format") if isinstance(session, dict) else None
    if given is not None and given != FORMAT:
        raise InputError(
            f"{path}: session.format: found {escape(repr(given))}, expected {FORMAT!r}",
            field="session.format",
        )
    root = path.parent if image_root is None else Path(image_root)
    is_torn = bool(losses)
    reader = _Reader(ImageFolder(path.parent, root), losses)
    tree = reader.tree(session if isinstance(session, dict) else {})
    if is_torn or not tree.nodes:
        tree = reader.with_content(tree, _list(record, "content"))
    if not tree.nodes:
        raise InputError(f"{path}: holds no part that is whole, expected a session{_first(losses)}")
    return SavedSession(reader.head(record), tree, tuple(losses))


def _first(losses: Sequence[str]) -> str:
    return f" ({losses[0]})" if losses else ""


def _record_of(path: Path, losses: list[str]) -> dict[str, Any]:
    """The JSON object of a file; of a damaged one, what its whole lines hold."""
    try:
        data = read_regular_file(path, max_bytes=MAX_RECORD_BYTES)
    except ImageError as error:
        raise InputError(str(error).replace("image ", "session ", 1)) from error
    try:
        record = parse_strict(data.decode("utf-8"), str(path))
        if isinstance(record, dict):
            return record
        raise InputError(f"{path}: found no object, expected a session")
    except UnicodeDecodeError as error:
        losses.append(f"byte {error.start} of the file is not UTF-8; what its whole lines hold was read")
    except InputError as error:
        losses.append(f"the file is damaged ({error}); what its whole lines hold was read")
    return _salvaged(data)


def _salvaged(data: bytes) -> dict[str, Any]:
    """The fields and nodes that stand whole on lines of their own."""
    record: dict[str, Any] = {}
    session: dict[str, Any] = {"nodes": []}
    for line in _whole_lines(data):
        if "node" in line:
            session["nodes"].append(line)
        elif "type" in line and "format" not in session:
            record.setdefault("content", []).append(line)
        elif len(line) == 1:
            [(name, value)] = line.items()
            if name in _HEAD:
                record.setdefault(name, value)
            elif name in ("format", "chosen", "past", "future"):
                session.setdefault(name, value)
    return {**record, "session": session}


def _whole_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The objects that lines are: `{...}`, or `"name": value`."""
    for line in data.splitlines():
        try:
            text = line.decode("utf-8").strip().removesuffix(",")
            value = parse_strict(text if text.startswith("{") else f"{{{text}}}", "line")
        except (UnicodeDecodeError, InputError):
            continue
        if isinstance(value, dict) and value:
            yield value


class _Reader:
    """Reads what is whole, and notes what is not."""

    def __init__(self, folder: ImageFolder, losses: list[str]):
        self.folder, self.losses = folder, losses

    def head(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The document's fields, those that are of the right kind."""
        found: dict[str, Any] = {}
        for name, kind in zip(_HEAD, (str, str, dict, dict), strict=True):
            value = record.get(name)
            if isinstance(value, kind) and value and (name != "layout" or _is_layout(value)):
                found[name] = value
            elif value:
                self.losses.append(f"{name}: found {describe(value)}, which is none; it is left out")
        if "id" not in found:
            self.losses.append("id: the document's name is lost")
        parts = [self.part(part, f"target[{place}]") for place, part in enumerate(_list(record, "target"))]
        if any(parts):
            found["target"] = tuple(part for part in parts if part is not None)
        return found

    def tree(self, session: Mapping[str, Any]) -> PartTree:
        """All nodes that are whole; what hangs on a lost one hangs on the node before it."""
        nodes: list[Node] = []
        # Where each of the file's nodes is now; of a lost one, that is the node before it.
        now: dict[int, int] = {ROOT: ROOT}
        for place, found in enumerate(_list(session, "nodes")):
            record: dict[str, Any] = found if isinstance(found, dict) else {}
            number, after, settings = (record.get(key) for key in ("node", "after", "settings"))
            number = number if _is_index(number) else place
            if _is_index(after) and after not in now:
                self.losses.append(f"node {number}: the part before it is lost, it begins a document now")
            now[number] = now.get(after, ROOT) if _is_index(after) else ROOT
            part = self.part(found, f"node {number}")
            if part is not None:
                nodes.append(Node(part, now[number], settings if isinstance(settings, dict) else {}))
                now[number] = len(nodes) - 1
        return self._remembered(tuple(nodes), session, now)

    def with_content(self, tree: PartTree, content: Sequence[Any]) -> PartTree:
        """The tree, or the path that was shown, of which more may be whole in the document's own field."""
        reader = _Reader(self.folder, [] if tree.nodes else self.losses)
        parts = [reader.part(record, f"content[{place}]") for place, record in enumerate(content)]
        whole = [part for part in parts if part is not None]
        return tree.showing(whole) if len(whole) > len(tree.path) else tree

    def part(self, record: Any, name: str) -> Part | None:
        """One part; None, and noted, where it is lost."""
        try:
            if not isinstance(record, dict):
                raise FieldError("", "found no object, expected a part")
            [part] = content_parts(Field([record]), self.folder)
            if isinstance(part, Image):
                self._check(part, name)
            return part
        except (FieldError, ImageError, ValueError) as error:
            kind = "image" if isinstance(record, dict) and record.get("type") == "image" else "part"
            self.losses.append(f"{name}: the {kind} is lost: {str(error).removeprefix('[0].')}")
            return None

    def _check(self, image: Image, name: str):
        """Raises ImageError for a file that is no image any more; one that is another image is noted."""
        upright_size(image.source, name=image.name)
        stem = image.source.stem if isinstance(image.source, Path) else ""
        is_named_by_hash = len(stem) == _HASH_DIGITS and set(stem) <= set("0123456789abcdef")
        if is_named_by_hash and isinstance(image.source, Path) and _hash_of(image.source) != stem:
            # Changed by hand it may be, and wanted; a damaged one mostly cannot be opened at all.
            image.load()
            self.losses.append(f"{name}: the image {escape(image.name or '')!r} is not as it was saved")

    def _remembered(
        self, nodes: tuple[Node, ...], session: Mapping[str, Any], now: Mapping[int, int]
    ) -> PartTree:
        """The tree with what was shown and how it came; of what is not said, the newest is shown."""
        if isinstance(session.get("chosen"), list):
            chosen: dict[int, int] = {}
            for pair in _path_first(_list(session, "chosen")):
                before, after = (now.get(number, ROOT) for number in pair)
                if after != ROOT and nodes[after].parent == before:
                    chosen.setdefault(before, after)
            torn = {pair[0] for pair in _path_first(_list(session, "chosen")) if pair[1] not in now}
            # Of what was shown and is lost, the newest of its alternatives takes the place.
            for number, node in enumerate(nodes):
                if node.parent in {now.get(before) for before in torn}:
                    chosen[node.parent] = number
        else:
            chosen = {node.parent: number for number, node in enumerate(nodes)}
        past, future = (
            tuple(now[tip] for tip in _list(session, name) if _is_index(tip) and tip in now)
            for name in ("past", "future")
        )
        return PartTree(nodes, chosen, past, future)


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    return found if isinstance(found, list) else []


def _path_first(pairs: list[Any]) -> list[tuple[int, int]]:
    """What is chosen after which node, along the path that is shown first: where a lost node leaves its place
    to several, those of the path have it.
    """
    chosen = {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(map(_is_index, pair)) and pair[0] < pair[1]
    }
    path, at = list[tuple[int, int]](), ROOT
    while at in chosen:
        path.append((at, chosen[at]))
        at = chosen[at]
    return path + [pair for pair in chosen.items() if pair not in path]


def _is_layout(value: Any) -> bool:
    try:
        canonical_layout(value)
    except UsageError:
        return False
    return True


def _is_index(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= ROOT
