"""WebDataset tars as img2dataset writes them: for each pair a `.jpg`, a `.txt` and a `.json` of one key.

The members of a sample have to stand next to each other. A key that comes again, a member that comes twice
and a sample without its image or caption are broken items; so is everything after the place where a tar was
cut, and the sample before that place, whose members may be missing. No sample takes anything of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import IO, Annotated

from mm_interleaved.data.source import (
    BrokenItem,
    FilteredItem,
    Item,
    ItemRandom,
    Shard,
    attempt,
)
from mm_interleaved.data.sources.pairs import caption_of, pair_parts
from mm_interleaved.data.storage.files import found_files, open_file, reading, stem_of
from mm_interleaved.data.storage.manifests import check_against_manifest, warn_of_unlisted
from mm_interleaved.data.storage.tar_files import Member, member_bytes, tar_members
from mm_interleaved.documents.document import Document, Image
from mm_interleaved.documents.record_files import decoded
from mm_interleaved.documents.strict_json import Field, FieldError, parse_strict
from mm_interleaved.errors import InputError, escape
from mm_interleaved.typed_settings import NUMBER, SEED, SHARE, check

_IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_ABOUT = ("json",)
"""What img2dataset records about a pair; of no use where its caption stands in a `.txt`."""
_REFUSED_KINDS = ("pkl", "pickle", "pyd", "pth", "pt", "npy")


@dataclass(slots=True)
class _Sample:
    """The members of one key, by their kinds (what follows the first dot of the name, in lower case)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTars:
    """Pairs out of tars; the defaults are those of the released model's training."""

    paths: str | tuple[str, ...]
    image_first_share: Annotated[float, SHARE] = 0.5
    """The image stands before its caption in this share (0 to 1) of the documents."""
    lower_case: bool = True
    """Captions in lower case."""
    min_characters: int = 1
    """Pairs with a shorter caption are left out."""
    seed: Annotated[int, SEED] = 0
    epoch: Annotated[int, NUMBER] = 0

    def __post_init__(self):
        check(self)

    def shards(self) -> list[Shard]:
        paths = found_files(self.paths)
        # The format itself checks headers only.
        warn_of_unlisted(paths)
        return [Shard(path) for path in paths]

    def read(self, shard: Shard, start: int = 0) -> Iterator[tuple[int, Item]]:
        path = shard.name
        position = -1
        try:
            check_against_manifest(path)
            with ExitStack() as stack:
                headers, contents = (stack.enter_context(open_file(path)) for _ in range(2))
                for position, sample in enumerate(_samples(headers, path)):
                    if position >= start:
                        place = f"{path}: {escape(sample.key)}"
                        rng = ItemRandom(self.seed, self.epoch, path, position)
                        build = partial(self._document, place, sample, contents, path, rng)
                        names = {kind: member.name for kind, member in sample.members.items()}
                        yield position, attempt(place, build, Field(names), known=_ABOUT)
        except InputError as error:
            yield max(position + 1, start), BrokenItem(path, str(error).removeprefix(f"{path}: "))

    def _document(
        self, place: str, sample: _Sample, contents: IO[bytes], path: str, rng: ItemRandom, names: Field
    ) -> Document | FilteredItem:
        if sample.problem:
            raise FieldError("", sample.problem)
        image_member = sample.members[_image_kind(names)]
        caption = _caption(sample, names, contents, path)
        if len(caption) < self.min_characters:
            return FilteredItem(place, "short_caption")
        image = Image(member_bytes(contents, image_member, path), name=f"{path}: {image_member.name}")
        parts = pair_parts(
            image, caption, rng, image_first_share=self.image_first_share, lower_case=self.lower_case
        )
        return Document(id=f"{stem_of(path)}/{sample.key}", parts=parts)


def _samples(headers: IO[bytes], path: str) -> Iterator[_Sample]:
    """The members grouped by key. A sample is given out once its end is known to be sound."""
    sample: _Sample | None = None
    finished: set[str] = set()
    with reading(path):
        # None stands for the sound end of the archive; where that is missing, tar_members raises before it.
        for member in chain(tar_members(headers, path), [None]):
            key, kind = _key_and_kind(member.name) if member else ("", "")
            if sample is not None and (member is None or key != sample.key):
                yield sample
                finished.add(sample.key)
                sample = None
            if member is not None and kind:
                if sample is None:
                    sample = _Sample(key, problem=_again(key) if key in finished else "")
                _add(sample, member, kind)


def _again(key: str) -> str:
    return f"the key {escape(key)!r} was there already; expected the members of a sample next to each other"


def _add(sample: _Sample, member: Member, kind: str):
    problem = ""
    if member.problem:
        problem = f"{escape(member.name)!r} {member.problem}"
    elif kind in sample.members:
        problem = f"found two members {escape(kind)!r}, expected one"
    elif kind in _REFUSED_KINDS:
        problem = f"{escape(member.name)!r}: files of this kind can run code and are never read"
    sample.members[kind] = member
    sample.problem = sample.problem or problem


def _key_and_kind(name: str) -> tuple[str, str]:
    """`a/0001.seg.PNG` → `a/0001`, `seg.png`."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _image_kind(names: Field) -> str:
    kinds = [kind for kind in names.object() if kind in _IMAGE_KINDS]
    if len(kinds) != 1:
        raise FieldError("", f"found {len(kinds)} images ({_kinds(names)}), expected one")
    assert names[kinds[0]], "asked for: it is used"
    return kinds[0]


def _caption(sample: _Sample, names: Field, contents: IO[bytes], path: str) -> str:
    """Out of the `.txt`, or where that is missing or blank the `caption` of the `.json`."""
    found = [names[kind] for kind in ("txt", "json") if kind in names]
    if not found:
        raise FieldError("", f"found {_kinds(names)}, expected a .txt or a .json with the caption")
    for name in found:
        place = f"{path}: {name.value}"
        text = decoded(member_bytes(contents, sample.members[name.path], path), place, is_start=True)
        if name.path == "txt":
            caption = text.strip()
        else:
            about = Field(parse_strict(text, place))
            is_only_one = len(found) == 1
            caption = caption_of(about["caption"]) if is_only_one or about.get("caption") else ""
        if caption:
            return caption
    return ""


def _kinds(names: Field) -> str:
    return ", ".join(f".{escape(kind, 20)}" for kind in names.object())
