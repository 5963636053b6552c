"""Every official format that StoryWorld is exported to is read back: same texts, pictures and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mm_interleaved.data.convert import convert_source
from mm_interleaved.data.registry import SOURCES, make_source, source_name_of
from mm_interleaved.data.source import BrokenItem, FilteredItem, Source
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.storyworld.exports import EXPORTS, write_storyworld
from mm_interleaved.storyworld.tasks import document

COUNT = 3


def items(source: Source) -> list:
    return [item for shard in source.shards() for _, item in source.read(shard)]


def documents(source: Source) -> list[Document]:
    found = items(source)
    assert not [str(item) for item in found if isinstance(item, BrokenItem | FilteredItem)]
    return found


def made(task: str | None) -> list[Document]:
    return [document("test", 5, index, task) for index in range(COUNT)]


def plain(parts, with_roles=True) -> list:
    """Parts as values that can be compared: texts, and the bytes of pixels."""
    return [
        (
            part.text if isinstance(part, Text) else np.asarray(part.load()).tobytes(),
            part.role if with_roles else None,
        )
        for part in parts
    ]


def same(one: Document, other: Document) -> bool:
    layouts = (one.layout, other.layout if other.target else None)
    return (
        plain(one.parts) == plain(other.parts)
        and plain(one.target) == plain(other.target)
        and (layouts[0] == layouts[1])
    )


def whole(story: Document) -> Document:
    return replace(story, parts=(*story.parts, *story.target), target=())


def with_memory_files(folder: Path):
    """Copies a folder to the storage of `memory://`."""
    memory = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe(f"/{file.relative_to(folder.parent).as_posix()}", file.read_bytes())


def address(value, folder: Path):
    """The address of a path that lies in a folder; anything else as it is."""
    return value.replace(f"{folder}/", "memory://") if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    fsspec.filesystem("memory").store.clear()


PAIR = {"lower_case": False, "image_first_share": 1}
WORLD = {
    # format: (source, settings, task, what of the original is to be found)
    "mmc4": ("mmc4", {"image_first_share": 0}, "story", whole),
    "obelics": ("documents", {}, "story", whole),
    "obelics-parquet": ("obelics", {}, "story", whole),
    "coco": ("captions", {}, "caption", None),
    "vqav2": ("vqa", {"annotations": "annotations.json"}, "vqa", None),
    "visdial": ("visdial", {}, "dialogue", None),
    "refcoco": ("refcoco", {}, "ground", None),
    "ade20k": ("ade20k", {}, "segmentation", None),
    "vist": ("vist", {"num_given": 2}, "story", None),
}


@pytest.mark.parametrize("form", WORLD)
def test_what_is_exported_is_read_back_and_converted(tmp_path, form):
    name, settings, task, expected = WORLD[form]
    path = write_storyworld(tmp_path / "out", COUNT, 5, "test", form)
    assert source_name_of(str(path)) == name
    if "annotations" in settings:
        settings = {**settings, "annotations": str(path.parent / settings["annotations"])}
    found = documents(make_source(name, {"paths": str(path), **settings}))
    wanted = [expected(one) if expected else one for one in made(task)]
    assert len(found) == COUNT and all(map(same, found, wanted))
    assert len({one.id for one in found}) == COUNT
    with_memory_files(tmp_path / "out")
    remote = {key: address(value, tmp_path) for key, value in {"paths": str(path), **settings}.items()}
    assert all(map(same, documents(make_source(name, remote)), found))
    converted = tmp_path / "elsewhere" / "documents.jsonl"
    convert_source(make_source(name, {"paths": str(path), **settings}), converted)
    again = read_documents(converted)
    assert all(map(same, again, found)) and [one.id for one in again] == [one.id for one in found]


def test_own_documents_come_back_as_they_are(tmp_path):
    path = write_storyworld(tmp_path / "out", 30, 5, "test", "jsonl")
    found = documents(make_source("documents", {"paths": str(path)}))
    for one, index in zip(found, range(30), strict=True):
        wanted = document("test", 5, index)
        assert same(one, wanted) and one.id == wanted.id and one.layout == wanted.layout
        assert one.meta["task"] == wanted.meta["task"]


def test_conversations_keep_all_turns(tmp_path):
    path = write_storyworld(tmp_path / "out", COUNT, 5, "test", "llava")
    found = documents(make_source("llava", {"paths": str(path)}))
    wanted = [whole(one) for task in ("caption", "vqa", "dialogue") for one in made(task)]
    assert len(found) == 3 * COUNT and all(map(same, found, wanted))
    assert max(sum(part.role == "assistant" for part in one.parts) for one in found) > 1


def test_inputs_of_the_official_program_are_read(tmp_path):
    path = write_storyworld(tmp_path / "out", COUNT, 5, "test", "annt")
    for one, wanted in zip(
        documents(make_source("documents", {"paths": str(path)})), made("story"), strict=True
    ):
        assert plain(one.parts) == plain((*wanted.parts, *wanted.target)[:3])
        assert one.layout.startswith("I")


@pytest.mark.parametrize(("form", "name"), [("laion", "laion"), ("webdataset", "webdataset")])
def test_pairs_come_back_in_either_order(tmp_path, form, name):
    path = write_storyworld(tmp_path / "out", COUNT, 5, "test", form)
    assert source_name_of(str(path)) == name
    found = documents(make_source(name, {"paths": str(path), **PAIR}))
    for one, wanted in zip(found, made("caption"), strict=True):
        image, text = next(part for part in wanted.parts if isinstance(part, Image)), wanted.target[0]
        assert plain(one.parts, with_roles=False) == plain((image, text), with_roles=False)
    [text, image] = documents(make_source(name, {"paths": str(path), "image_first_share": 0}))[0].parts
    assert isinstance(image, Image) and text.text == made("caption")[0].target[0].text.lower()


def test_every_export_has_its_source():
    assert set(EXPORTS) == {*WORLD, "jsonl", "llava", "annt", "laion", "webdataset"}
    assert {name for name, *_ in WORLD.values()} < set(SOURCES)
