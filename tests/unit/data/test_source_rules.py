"""What holds for every source, whatever it reads: tried on a small corpus of each one that is registered."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

import mm_interleaved
from mm_interleaved.data.check import Inspection
from mm_interleaved.data.convert import convert_source
from mm_interleaved.data.registry import SOURCES, make_source
from mm_interleaved.data.source import (
    BrokenItem,
    FilteredItem,
    Shard,
    attempt,
    items_of,
    shards_of,
)
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.record_rules import AS_TEXT, is_content_name
from mm_interleaved.errors import InputError, MMInterleavedError, StorageError
from mm_interleaved.tokens.boxes import Box

SIZE = (64, 48)
NAMES = ("a.jpg", "b.jpg", "c.jpg")


def encoded() -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", SIZE, "red").save(buffer, format="PNG")
    return buffer.getvalue()


def put(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    return str(path)


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@dataclass(frozen=True)
class Sample:
    """How a corpus of one item is written: with further fields in its record, with some text as its answer.

    `fields` and `said` say what a source has of them: records with names, and a text that is learned.
    """

    write: Callable[[Path, Mapping, str], dict]
    has_fields: bool = True
    has_text: bool = True


def documents(folder, more, said):
    turns = [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}]
    target = [{"type": "text", "text": said}]
    return {"paths": put(folder / "a.jsonl", lines({"messages": turns, "target": target} | more))}


def llava(folder, more, said):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": said}]
    return {"paths": put(folder / "a.json", json.dumps([{"image": "a.jpg", "conversations": turns} | more]))}


def mmc4(folder, more, said):
    info = {"image_name": "a.jpg", "matched_text_index": 0, "matched_sim": 0.5}
    page = {"text_list": [said], "image_info": [info]} | more
    return {"paths": put(folder / "a.jsonl", lines(page)), "single_image_share": 1}


def laion(folder, more, said):
    return {"paths": put(folder / "0.txt", lines({"image": "a.jpg", "caption": said} | more))}


def webdataset(folder, more, said):
    kinds = {"png": encoded(), "txt": said.encode()} | {name: str(v).encode() for name, v in more.items()}
    with tarfile.open(folder / "0.tar", "w") as archive:
        for kind, data in kinds.items():
            info = tarfile.TarInfo(f"0001.{kind}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return {"paths": str(folder / "0.tar")}


def obelics(folder, more, said):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"texts": [said, None], "images": [None, "a.jpg"]} | more
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "0.parquet")
    return {"paths": str(folder / "0.parquet")}


def captions(folder, more, said):
    table = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": said} | more],
    }
    return {"paths": put(folder / "captions.json", json.dumps(table))}


def paragraphs(folder, more, said):
    record = {"image_id": "a", "paragraph": said} | more
    return {"paths": put(folder / "paragraphs.json", json.dumps([record]))}


def vqa(folder, more, said):
    question = {"image": "a.jpg", "question": "What?", "answers": [said]} | more
    return {"paths": put(folder / "questions.json", json.dumps([question]))}


def visdial(folder, more, said):
    dialog = {"image_id": 1, "image": "a.jpg", "dialog": [{"question": 0, "answer": 0}]} | more
    data = {"dialogs": [dialog], "questions": ["what"], "answers": [said]}
    return {"paths": put(folder / "visdial.json", json.dumps({"data": data}))}


def refcoco(folder, more, said):
    return {
        "paths": put(folder / "r.jsonl", lines({"image": "a.jpg", "sent": said, "bbox": [1, 1, 9, 9]} | more))
    }


def flickr30k(folder, more, said):
    put(folder / "Sentences" / "a.txt", f"[/EN#1/people {said}]\n")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
    put(folder / "Annotations" / "a.xml", f"<a>{size}<object><name>1</name>{box}</object></a>")
    return {"paths": put(folder / "train.txt", "a\n")}


def ade20k(folder, more, said):
    for name in ("images", "annotations_with_color"):
        put(folder / name / "a.png", encoded())
    return {"paths": put(folder / "training.json", json.dumps([{"image_id": "a", "caption": said} | more]))}


def vist(folder, more, said):
    panels = [{"sequence_index": n, "image_id": name, "caption": said} | more for n, name in enumerate("abc")]
    return {"paths": put(folder / "vist.json", json.dumps({"annotations": {"s": panels}})), "num_given": 2}


def frames(folder, more, said):
    panels = [{"image": name, "caption": said} for name in NAMES]
    record = {"id": "s", "split": "train", "frames": panels} | more
    return {"paths": put(folder / "stories.jsonl", lines(record)), "num_given": 2}


# What is drawn instead of read has no files in which something could be wrong.
READING = set(SOURCES) - {"storyworld"}

SAMPLES = {
    "documents": Sample(documents),
    "llava": Sample(llava),
    "mmc4": Sample(mmc4),
    "laion": Sample(laion),
    "webdataset": Sample(webdataset),
    "obelics": Sample(obelics),
    "captions": Sample(captions),
    "paragraphs": Sample(paragraphs),
    "vqa": Sample(vqa),
    "visdial": Sample(visdial),
    # What is said there is a phrase to look for, within a prompt that is never blank.
    "refcoco": Sample(refcoco, has_text=False),
    # Lines of text and XML: no records with names of fields.
    "flickr30k-entities": Sample(flickr30k, has_fields=False, has_text=False),
    # The caption is asked, the picture is the answer.
    "ade20k": Sample(ade20k, has_text=False),
    "vist": Sample(vist),
    "pororosv": Sample(frames),
    "flintstonessv": Sample(frames),
}
WITH_FIELDS = sorted(name for name, sample in SAMPLES.items() if sample.has_fields)


def read(name: str, folder: Path, more=(), said="A red dog.") -> list:
    for file in NAMES:
        put(folder / file, encoded())
    source = make_source(name, SAMPLES[name].write(folder, dict(more), said))
    return [item for shard in source.shards() for _, item in source.read(shard)]


def test_every_source_is_tried():
    assert set(SAMPLES) == READING


@pytest.mark.parametrize("name", sorted(READING))
def test_the_corpora_are_sound_to_begin_with(tmp_path, name):
    [one] = read(name, tmp_path)
    assert isinstance(one, Document) and one.remarks == () and one.place
    assert any(isinstance(part, Image) for part in (*one.parts, *one.target))


CONTENT = {
    "video": "v.mp4",
    "videos": ["v.mp4"],
    "audio": {"path": "a.wav"},
    "file_name": "z.jpg",
    "gt_images": ["z.jpg"],
    "image_path": "z.jpg",
    "imageUrls": ["http://x/z.jpg"],
    "img2": "z.jpg",
    "system": "Be kind.",
    "instruction": "Say it.",
    "final_answer": "blue",
    "model_response": "blue",
    "output": "blue",
    "reasoning_content": "because",
    "mp4": "film",
    "seg.png": "map",
}


@pytest.mark.parametrize("field", sorted(CONTENT))
@pytest.mark.parametrize("name", WITH_FIELDS)
def test_content_that_no_reader_uses_makes_the_item_broken(tmp_path, name, field):
    found = read(name, tmp_path, {field: CONTENT[field]})
    assert len(found) == 1 and isinstance(found[0], BrokenItem), found
    assert field in str(found[0]) and "would be lost" in str(found[0])


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_what_holds_nothing_is_not_lost(tmp_path, name):
    if name == "webdataset":
        return  # a member is there, or it is not
    more = {"video": None, "system": "", "num_images": 3, "has_audio": True}
    found = read(name, tmp_path, more if name == "obelics" else {**more, "images_beside": [], "answer": None})
    assert len(found) == 1 and isinstance(found[0], Document)
    assert all(remark.startswith("unused field") for remark in found[0].remarks)


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_other_fields_that_no_reader_uses_are_remarked_by_name(tmp_path, name):
    [one] = read(name, tmp_path, {"licence": "CC", "aesthetic": 5.5})
    assert len(one.remarks) == 2
    assert "licence'" in one.remarks[0] and "aesthetic'" in one.remarks[1]


@pytest.mark.parametrize("said", ["", "  ", "\n\t "])
@pytest.mark.parametrize("name", sorted(name for name, sample in SAMPLES.items() if sample.has_text))
def test_no_blank_answer_is_learned(tmp_path, name, said):
    found = read(name, tmp_path, said=said)
    documents_found = [item for item in found if isinstance(item, Document)]
    assert len(found) == 1
    for one in documents_found:
        learned = one.target or one.parts
        assert all(isinstance(part, Image) or part.text.strip() for part in learned)
    assert documents_found or isinstance(found[0], FilteredItem)


@pytest.mark.parametrize("markup", ["<image>", "<image_1>", "<|image|>", "[IMG]", "<video>", "<ImageHere>"])
@pytest.mark.parametrize("name", sorted(READING - {"documents", "flickr30k-entities"}))
def test_markup_that_matches_no_image_is_remarked(tmp_path, name, markup):
    [one] = read(name, tmp_path, said=f"A dog {markup} here.")
    assert AS_TEXT in one.remarks and one.place
    assert (
        markup.lower()
        in " ".join(part.text for part in (*one.parts, *one.target) if isinstance(part, Text)).lower()
    )


def test_what_a_user_types_in_our_own_form_is_text(tmp_path):
    [one] = read("documents", tmp_path, said="Write <image> and [IMG].")
    assert one.target == (Text("Write <image> and [IMG]."),) and one.remarks == ()


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 10**13),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


def places_of(value, place=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, item in items for deeper in places_of(item, (*place, key)))]


def replaced(value, place, new):
    """A copy with another value at a place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("name", sorted(READING - {"webdataset", "obelics", "flickr30k-entities"}))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_record_ends_the_reading(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("corpus")
    for file in NAMES:
        put(folder / file, encoded())
    described = SAMPLES[name].write(folder, {}, "A red dog.")
    path = Path(described["paths"])
    whole = json.loads(path.read_text())
    changed = replaced(whole, data.draw(st.sampled_from(places_of(whole))), data.draw(json_values))
    path.write_text(json.dumps(changed))
    source = make_source(name, described)
    try:
        found = [item for shard in source.shards() for _, item in source.read(shard)]
    except MMInterleavedError as error:
        assert error.exit_code == 3 and "\n" not in str(error)
        return
    assert all(isinstance(item, Document | BrokenItem | FilteredItem) for item in found)
    assert "cannot be read (" not in " ".join(map(str, found)), "a fault of the reader, not of the record"


def test_a_reader_that_fails_breaks_one_item_and_failing_storage_is_told():
    def fails(error):
        def build():
            raise error

        return build

    broken = attempt("a.json: [3]", fails(AttributeError("no such thing")))
    assert str(broken) == "a.json: [3]: cannot be read (AttributeError: no such thing)"
    with pytest.raises(StorageError):
        attempt("a", fails(StorageError("gone")))


@pytest.mark.parametrize("name", ["refcoco", "flickr30k-entities"])
def test_no_blank_phrase_is_looked_for(tmp_path, name):
    [item] = read(name, tmp_path, said=" ")
    assert "found nothing but blanks, expected a question or a phrase" in str(item)


@dataclass(frozen=True)
class FailingSource:
    """A source with a fault of its own, in `shards` or behind the first item of `read`."""

    fails_at: str
    paths: str = "a.json"

    def shards(self):
        return [Shard("a.json")] if self.fails_at != "shards" else [][0]

    def read(self, shard, start=0):
        yield 0, Document(id="x", parts=(Text("x"),))
        yield 1, [][0]


def test_a_source_that_fails_outside_of_an_item_ends_no_command(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: cannot be read \(IndexError: list index out of range\)"):
        shards_of(FailingSource("shards"))
    source = FailingSource("read")
    [(_, first), (position, last)] = items_of(source, Shard("a.json"))
    assert isinstance(first, Document) and position == 1
    assert str(last) == "a.json: cannot be read on (IndexError: list index out of range)"
    inspection = Inspection("a")
    assert len(list(inspection.items(source, shards_of(source)))) == 2 and inspection.report.num_broken == 1
    with pytest.raises(InputError, match="cannot be read on"):
        convert_source(source, tmp_path / "out.jsonl")


def test_nobody_reads_a_source_around_that():
    package = Path(mm_interleaved.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\.read\(shard|\.shards\(\)", path.read_text(encoding="utf-8"))
    }
    assert users == {"data/source.py"}


@pytest.mark.parametrize(
    "name",
    [
        "images",
        "image",
        "imagePath",
        "image_files",
        "video",
        "audio_path",
        "answers",
        "gt_answer",
        "system",
        "file_name",
        "imageurl",
        "systemprompt",
    ],
)
def test_names_of_content(name):
    assert is_content_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "image_id",
        "url",
        "coco_url",
        "id",
        "width",
        "licence",
        "source",
        "source_file",
        "answer_type",
        "split",
        "",
        "日本",
    ],
)
def test_names_of_other_things(name):
    assert not is_content_name(name)


sides = st.integers(1, 5000)
edges = st.floats(allow_nan=True, allow_infinity=True)


@given(left=edges, top=edges, right=edges, bottom=edges, width=sides, height=sides)
def test_a_box_lies_in_its_image_or_is_refused(left, top, right, bottom, width, height):
    try:
        box = Box((left, top, right, bottom), width, height)
    except ValueError as error:
        assert "found the box" in str(error)
        return
    assert -1 <= left < right <= width + 1 and -1 <= top < bottom <= height + 1
    assert len(box.answer()) == len("(000,000)(000,000)")


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([10, 10, 875, 833], "does not lie in the image of 64 x 48 pixels"),
        ([0.1, 0.1, 0.9, 0.9], "looks like shares of the image"),
        ([0, 0, 1, 1], "looks like shares of the image"),
        ([0, 0, 1e308, 20], "does not lie in the image"),
        ([-5, 0, 20, 20], "does not lie in the image"),
        ([20, 20, 10, 30], "expected left < right"),
        ([1, 1, 1, 30], "expected left < right"),
        ([-0.5, 0, 64.9, 48.5], None),
        ([0, 0, 64, 48], None),
    ],
)
def test_boxes_are_held_against_the_image(tmp_path, box, words):
    put(tmp_path / "a.jpg", encoded())
    path = put(tmp_path / "r.jsonl", lines({"image": "a.jpg", "sent": "man", "bbox": box}))
    source = make_source("refcoco", {"paths": path})
    [(_, item)] = source.read(source.shards()[0])
    assert isinstance(item, Document) if words is None else words in str(item)


@pytest.mark.parametrize(
    ("size", "is_fine"), [((64, 48), True), ((128, 96), True), ((48, 64), False), ((999, 48), False)]
)
def test_a_recorded_size_is_held_against_the_file(tmp_path, size, is_fine):
    put(tmp_path / "a.jpg", encoded())
    record = {"image": "a.jpg", "sent": "man", "bbox": [1, 1, 30, 30], "width": size[0], "height": size[1]}
    source = make_source("refcoco", {"paths": put(tmp_path / "r.jsonl", lines(record))})
    [(_, item)] = source.read(source.shards()[0])
    assert isinstance(item, Document) if is_fine else "but the image has 64 x 48" in str(item)
