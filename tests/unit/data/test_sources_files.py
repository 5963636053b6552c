"""Where files lie, how a shard is read on from any place, and what is never silent: damage of every kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.data.pickled_annotations import read_pickled
from mm_interleaved.data.registry import SOURCES, make_source, source_name_of
from mm_interleaved.data.source import BrokenItem, Shard, in_epoch
from mm_interleaved.data.storage import files, records
from mm_interleaved.data.storage.files import found_files
from mm_interleaved.data.storage.manifests import (
    MANIFEST,
    check_against_manifest,
    manifest_bytes,
    manifest_of,
)
from mm_interleaved.data.storage.records import read_records
from mm_interleaved.documents.document import Document
from mm_interleaved.documents.record_files import Record
from mm_interleaved.errors import InputError, StorageError, UsageError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 2), (number, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:05}.png", png(number)), (f"{number:05}.txt", f"caption {number}".encode()))
    ]


def read(name: str, paths, **settings) -> list:
    source = make_source(name, {"paths": str(paths), **settings})
    return [item for shard in source.shards() for _, item in source.read(shard)]


def read_tar(path: Path, data: bytes) -> list:
    path.write_bytes(data)
    return read("webdataset", path, image_first_share=1)


def contents(found: list) -> list[tuple[bytes, str]]:
    return [(one.parts[0].source, one.parts[1].text) for one in found if isinstance(one, Document)]


# ---- Paths ----


def test_globs_braces_and_names_are_found_in_order(tmp_path):
    for name in ("b1", "b2", "a07", "a08", "a09", "a10"):
        (tmp_path / f"{name}.txt").write_text("x")

    def names(*patterns):
        return [Path(path).stem for path in found_files([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert names("b*.txt", "a07.txt") == ["b1", "b2", "a07"]
    assert names("a{07..10}.txt") == ["a07", "a08", "a09", "a10"]
    assert names("{b2,a08}.txt", "b?.txt") == ["b2", "a08", "b1"]
    assert found_files(f"file://{tmp_path}/b1.txt") == [f"{tmp_path}/b1.txt"]


def test_all_missing_files_are_named_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / f"{name}.jsonl").touch()
    (tmp_path / "y1").touch()
    with pytest.raises(InputError) as error:
        found_files(
            [
                f"{tmp_path}/no1.txt",
                f"{tmp_path}/no2.txt",
                f"{tmp_path}/x*",
                f"{tmp_path}/folder",
                f"{tmp_path}/y*",
            ]
        )
    assert f"such as {tmp_path}/folder/*.jsonl" in str(error.value)
    for words in ("no1.txt", "no2.txt", "x*: matches no", "is a folder", "y1: is empty"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    ["pipe:cat secret", "a{3..2}.tar", "a{0..9999999}.tar", "{0..9999}{0..9999}", "gopher://x/y.tar"],
)
def test_programs_and_absurd_patterns_are_refused(pattern):
    with pytest.raises(UsageError):
        found_files(pattern)
    with pytest.raises(UsageError):
        found_files([])


def test_addresses_are_read_like_files(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    record = {"id": "m", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "i/1.png"}]}
    memory.pipe("/corpus/a.jsonl", json.dumps(record).encode())
    memory.pipe("/corpus/i/1.png", png(7))
    memory.pipe("/corpus/0.tar", tar_of(pairs(2)))
    memory.pipe("/corpus/1.tar", tar_of(pairs(2)))
    try:
        [one] = read("documents", "memory://corpus/*.jsonl")
        assert one.images[0].source == png(7)
        found = read("webdataset", "memory://corpus/{0..1}.tar", image_first_share=1)
        assert contents(found) == contents(read_tar(tmp_path / "0.tar", tar_of(pairs(2)))) * 2
        with pytest.raises(InputError, match=r"2\.tar: there is no such file"):
            read("webdataset", "memory://corpus/{0..2}.tar")
        [lost] = read("documents", "memory://corpus/a.jsonl", images="memory://elsewhere")
        assert "memory://elsewhere" in str(lost)
    finally:
        memory.rm("/corpus", recursive=True)


def test_chained_addresses_stay_in_the_folder_of_the_images(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    (tmp_path / "secret.png").write_bytes(png(1))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("docs/a.jsonl", json.dumps({"image": "1.png", "text": "x"}))
        archive.writestr("docs/1.png", png(7))
    memory.pipe("/corpus/a.jsonl", b"{}")
    inside = f"zip://docs/a.jsonl::file://{tmp_path}/all.zip"
    try:
        [one] = read("documents", inside)
        assert one.images[0].source == png(7)
        assert found_files(inside.replace("a.jsonl", "*.jsonl")) == [inside]
        for name in (
            f"x.tar::file://{tmp_path}/secret.png",
            f"zip://x.tar::file://{tmp_path}/secret.png",
            f"file://{tmp_path}/secret.png",
            "../secret.png",
            f"{tmp_path}/secret.png",
        ):
            (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "text": "x"}))
            for images in ("memory://corpus", f"zip://docs::file://{tmp_path}/all.zip"):
                [lost] = read("documents", tmp_path / "a.jsonl", images=images)
                assert isinstance(lost, BrokenItem) and lost.field == "image", (name, images)
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
        (tmp_path / "root" / "1.png").write_bytes(png(7))
        for name, is_inside in (("link.png", False), ("1.png", True)):
            (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "text": "x"}))
            for scheme in ("local://", "file://", "simplecache::file://"):
                [item] = read("documents", tmp_path / "a.jsonl", images=f"{scheme}{tmp_path}/root")
                assert isinstance(item, Document) == is_inside, (name, scheme)
                assert is_inside or "outside the allowed folder" in str(item)
    finally:
        memory.rm("/corpus", recursive=True)


class RefusingStorage:
    """A client of a storage that is not there."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def fails(*_, **__):
            raise self.error

        return fails


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), RuntimeError("no credentials")])
def test_storage_that_does_not_answer_is_one_kind_of_error(monkeypatch, error):
    def connect(address):
        raise error

    for client in (connect, lambda address: (RefusingStorage(error), "x")):
        monkeypatch.setattr("fsspec.core.url_to_fs", client)
        monkeypatch.setattr(files, "_RETRY_AFTER_S", ())
        for reach in (found_files, files.file_exists, files.file_size, files.open_file):
            with pytest.raises(StorageError, match=r"ftp://x/a\.jsonl: does not answer"):
                reach("ftp://x/a.jsonl")


# ---- Reading on ----


def test_every_position_can_be_read_on_from_in_another_process(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([*pairs(4), ("x.png", b""), *pairs(2, 7)]))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    lines = [{"image": f"{n % 4}.png", "caption": f"Caption {n}"} for n in range(7)]
    (tmp_path / "a.txt").write_text("\n\n".join(map(json.dumps, lines)) + "\n{")
    (tmp_path / "a.json").write_text(json.dumps([{"image": line["image"], "text": "t"} for line in lines]))
    table = {
        "images": [{"id": 0, "file_name": "0.png"}],
        "annotations": [{"image_id": n % 2, "caption": "c"} for n in range(5)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(table))
    files = {"webdataset": "a.tar", "laion": "a.txt", "documents": "a.json", "captions": "captions.json"}
    for name, file in files.items():
        path = str(tmp_path / file)
        source = make_source(name, {"paths": path})
        [shard] = source.shards()
        whole = list(source.read(shard))
        assert [position for position, _ in whole] == list(range(len(whole))) and len(whole) > 4
        assert shard.num_items in (None, len(whole))
        for start in range(len(whole) + 1):
            # Through a pickle, as a worker process gets it.
            copy = pickle.loads(pickle.dumps(source))
            assert list(copy.read(shard, start)) == whole[start:], (name, start)


def test_chance_depends_on_the_epoch_and_not_on_the_folder(tmp_path):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar_of(pairs(40)))
        source = make_source("webdataset", {"paths": str(tmp_path / folder / "0.tar")})
        for epoch in range(2):
            [shard] = source.shards()
            items = [item for _, item in in_epoch(source, epoch).read(shard)]
            found.append(
                [
                    isinstance(item.parts[0].__class__, type) and item.parts[0].__class__.__name__
                    for item in items
                ]
            )
    assert found[0] == found[2] != found[1] == found[3]
    assert in_epoch(make_source("documents", {"paths": "x"}), 3) == make_source("documents", {"paths": "x"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pathx": "x"}, "did you mean 'paths'"),
        ({}, "paths: missing"),
        ({"paths": "x", "max_images": "many"}, "expected int"),
        ({"paths": "x", "max_images": True}, "expected int"),
        ({"paths": 3}, "expected str or tuple"),
        ({"paths": "x", "image_first_share": 1.5}, "expected 0 to 1"),
        ({"paths": "x", "max_images": 0}, "at least 1"),
        ({"paths": "x", "seed": -1}, "0 or more"),
    ],
)
def test_misspelt_and_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        make_source("mmc4", settings)
    with pytest.raises(UsageError, match="did you mean 'mmc4'"):
        make_source("mmc", {"paths": "x"})
    assert make_source("mmc4", {"paths": ["x"], "min_similarity": 0}).paths == ("x",)


# ---- Lines and lists ----

GOOD = {"id": "a", "content": [{"type": "text", "text": 'x ]}"{[ é'}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": "b", "conte', "column"),
        (b'{"id": "b"} {"id": "c"}', "column 13: not JSON"),
        (b'{"id": NaN}', "NaN"),
        (b'{"id": 1, "id": 2}', "twice"),
        (b'\xff{"id": 1}', "not UTF-8"),
        (b"[" * 100_000, "nested more than"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": 5}', "text: found the number 5"),
        (b'{"unknown": 5}', "unknown"),
        (b'{"image": "gone.png"}', "gone.png"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + line + b"\n" + good)
    first, second, third = read("documents", path)
    assert isinstance(first, Document) and first == third
    assert str(second).startswith(f"{path}:3: ") and words in str(second)


def test_lists_are_read_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK_BYTES", 5)
    rng = random.Random(0)
    path = tmp_path / "a.json"
    for _ in range(16):
        values = [
            {"a": "".join(rng.choice('"\\[]{}, é') for _ in range(rng.randrange(30))), "b": [{"c": n}]}
            for n in range(rng.randrange(4))
        ]
        start = rng.choice(["\ufeff", " \n", ""])
        data = (start + json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=False)).encode()
        path.write_bytes(data + b"\n ")
        assert [record.field.value for _, record in read_records(str(path))] == values
        for cut in range(1, len(data), 5):
            path.write_bytes(data[:cut])
            *_, (_, last) = read_records(str(path))
            assert isinstance(last, BrokenItem), data[:cut]


@pytest.mark.parametrize("text", ['[{"a":1} {"b":2}]', '["x"]', '[{"a":1},]', '[{"a":1}] x', "", "[", "[1]"])
def test_lists_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    *_, (_, last) = read_records(str(path))
    assert isinstance(last, BrokenItem)


def test_lines_lists_and_tables_may_be_gzip(tmp_path):
    lines = "".join(json.dumps({**GOOD, "id": str(n)}) + "\n" for n in range(3)).encode()
    for name, data in (("a.jsonl.gz", lines), ("a.json.gz", json.dumps([GOOD]).encode())):
        (tmp_path / name).write_bytes(gzip.compress(data))
    assert [one.id for one in read("documents", tmp_path / "a.jsonl.gz")] == ["0", "1", "2"]
    assert [one.id for one in read("documents", tmp_path / "a.json.gz")] == ["a"]
    assert source_name_of(str(tmp_path / "a.jsonl.gz")) == "documents"
    (tmp_path / "1.png").write_bytes(png(1))
    table = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "c"}]}
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(table).encode()))
    assert source_name_of(str(tmp_path / "c.json.gz")) == "captions"
    assert len(read("captions", tmp_path / "c.json.gz")) == 1
    data = gzip.compress(lines)
    for number, damaged in enumerate((data[:-9], data[:25], b"no gzip", data[:-8] + bytes(8))):
        path = tmp_path / f"bad{number}.jsonl.gz"
        path.write_bytes(damaged)
        assert "damaged" in str(read("documents", path)[-1])
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(100 << 20)))
    assert "becomes more than" in str(read("documents", tmp_path / "bomb.jsonl.gz")[-1])


def test_folders_of_images_are_read_by_their_metadata(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{n}.png", "text": f'A "{n}",\n\nfar away'} for n in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    for separator, name in ((";", "semicolons.csv"), ("\t", "tabs.csv"), ("\t", "tabs.tsv")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=separator).writerows([["file_name", "text"], *map(dict.values, rows)])
    for name in ("metadata.jsonl", "metadata.csv", "semicolons.csv", "tabs.csv", "tabs.tsv"):
        assert source_name_of(str(tmp_path / name)) == "documents"
        found = read("documents", tmp_path / name)
        assert [one.text for one in found] == [row["text"] for row in rows]
        assert [one.images[0].name for one in found] == ["0.png", "1.png"]
    for text, words in (
        ("file_name,text\n0.png\n", "found 1 values, expected 2"),
        ("text,text\na,b\n", "of different names"),
        ('file_name,text\n0.png,"cut', "not comma-separated"),
        ('file_name;text\n0.png;"cut', "not semicolon-separated"),
    ):
        (tmp_path / "metadata.csv").write_text(text)
        assert words in str(read("documents", tmp_path / "metadata.csv")[-1])


def test_nothing_warns_of_formats_that_notice_where_they_were_cut(tmp_path, caplog):
    for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        data = json.dumps(GOOD).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        caplog.clear()
        read("documents", tmp_path / name)
        assert ("a cut between records" in caplog.text) == (name == "a.jsonl")


def test_tables_that_cannot_be_read_stop_at_the_start(tmp_path):
    for name, text in (("captions", "{"), ("vqa", '{"questions": 3}'), ("visdial", "[]"), ("vist", "{}")):
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        with pytest.raises(InputError, match=path.name):
            make_source(name, {"paths": str(path)}).shards()


def test_zips_are_bounded_and_checked(tmp_path):
    path = tmp_path / "a.jsonl.zip"

    def zipped(*members, method=zipfile.ZIP_DEFLATED) -> list:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
        return read("documents", path)

    good = json.dumps(GOOD)
    assert [one.id for one in zipped(("a.jsonl", good))] == ["a"]
    assert [one.id for one in zipped(("a.json", f"[{good}]"))] == ["a"]
    mac = ("__MACOSX/._a.jsonl", b"x"), (".DS_Store", b"x")
    assert [one.id for one in zipped(("a.jsonl", good), *mac)] == ["a"]
    assert "found 2 files" in str(zipped(("a.jsonl", good), ("b.jsonl", good))[0])
    assert "times as many" in str(zipped(("a.jsonl", b" " * (100 << 20)))[0])
    zipped(("a.jsonl", good * 3), method=zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"text"', b'"texd"', 1))
    assert "CRC" in str(read("documents", path)[-1])
    path.write_bytes(data[:-30])
    assert "damaged, or no zip" in str(read("documents", path)[0])


def test_no_changed_bit_of_a_zip_is_silent(tmp_path):
    lines = "\n".join(json.dumps({"id": str(n), "text": f"words of {n} " * 5}) for n in range(40))
    path = tmp_path / "a.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", lines)
    data = path.read_bytes()
    whole = read("documents", path)
    assert len(whole) == 40
    rng = random.Random(5)
    for _ in range(150):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found = read("documents", path)
        assert found == whole or isinstance(found[-1], BrokenItem)


# ---- Tars ----


def test_no_cut_of_a_tar_is_silent(tmp_path):
    data = tar_of(pairs(5))
    whole = contents(read_tar(tmp_path / "whole.tar", data))
    assert len(whole) == 5
    silent = []
    cuts = [*range(1, len(data), 97), *range(512, len(data), 512)]
    for cut in cuts:
        found = read_tar(tmp_path / "cut.tar", data[:cut])
        kept = contents(found)
        assert kept == whole[: len(kept)]
        if not isinstance(found[-1], BrokenItem) and len(kept) < 5:
            silent.append(cut)
    assert silent == [] and len(cuts) > 120


def test_no_damaged_header_is_silent_and_no_sample_takes_from_another(tmp_path):
    members = pairs(5)
    data = tar_of(members)
    whole = contents(read_tar(tmp_path / "whole.tar", data))
    starts = [0]
    for _, content in members[:-1]:
        starts.append(starts[-1] + 512 + -(-len(content) // 512) * 512)
    rng = random.Random(1)
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.choice(starts) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        found = read_tar(tmp_path / "flipped.tar", bytes(flipped))
        kept = contents(found)
        assert set(kept) <= set(whole)
        assert len(kept) == 5 or isinstance(found[-1], BrokenItem)


def test_a_cut_shard_followed_by_one_with_the_same_keys_mixes_nothing(tmp_path):
    data = tar_of(pairs(3))
    cut = data[: data.index(b"00001.png") + 600]
    (tmp_path / "0.tar").write_bytes(cut)
    (tmp_path / "1.tar").write_bytes(tar_of([(name, b"other" + d) for name, d in pairs(3)]))
    found = read("webdataset", tmp_path / "*.tar", image_first_share=1)
    assert [isinstance(item, BrokenItem) for item in found] == [False, True, False, False, False]
    assert "0.tar" in str(found[1])
    for image, text in contents(found)[1:]:
        assert image.startswith(b"other") and text.startswith("other")


def test_long_names_and_other_dialects_of_tar_are_read(tmp_path):
    long = "é" + "x" * 150
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            for folder in ("", "./a/"):
                for kind, data in (("png", png(1)), ("txt", b"\xef\xbb\xbf words ")):
                    info = tarfile.TarInfo(f"{folder}{long}.{kind}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        found = read("webdataset", tmp_path / f"{number}.tar", image_first_share=1)
        assert contents(found) == [(png(1), "words")] * 2
        assert [one.id for one in found] == [f"{number}/{long}", f"{number}/a/{long}"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["a.png", "b.png", "a.txt", "b.txt"], ["a .txt", "a .txt", "there already", "there already"]),
        (["a.png", "a.png", "a.txt"], ["two members"]),
        (["a.png", "a.jpg", "a.txt"], ["found 2 images"]),
        (["a.PNG", "a.Txt"], []),
        (["a.txt"], ["found 0 images"]),
        (["a.png"], ["expected a .txt"]),
        (["a.png", "a.txt", "a.pkl"], ["can run code"]),
        (["../a.png", "../a.txt"], ["outside"]),
        (["/a.png", "/a.txt"], ["outside"]),
        (["a.png", "a.json"], ["not JSON"]),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, words):
    found = read_tar(tmp_path / "a.tar", tar_of([(name, b"x") for name in members] + pairs(1)))
    assert contents(found)[-1] == contents(read_tar(tmp_path / "b.tar", tar_of(pairs(1))))[0]
    broken = [str(item) for item in found if isinstance(item, BrokenItem)]
    assert len(broken) == len(words) and all(word in why for word, why in zip(words, broken, strict=True))


HIDDEN = (
    "._00000.png",
    "a/._b.txt",
    ".DS_Store",
    "__MACOSX/00000.png",
    "@eaDir/x.jpg",
    "Thumbs.db",
    "README",
)


def test_what_other_machines_leave_in_tars_is_passed_over(tmp_path):
    found = read_tar(tmp_path / "a.tar", tar_of([(name, b"x") for name in HIDDEN] + pairs(2)))
    mixed = [
        member for pair in zip([(name, b"x") for name in HIDDEN], pairs(4), strict=False) for member in pair
    ]
    assert contents(found) == contents(read_tar(tmp_path / "b.tar", tar_of(pairs(2)))) and len(found) == 2
    assert len(read_tar(tmp_path / "c.tar", tar_of(mixed + pairs(4)[7:]))) == 4
    record = {"image": "00000.png", "text": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    [one] = read("documents", tmp_path / "a.jsonl", images=str(tmp_path / "a.tar"))
    assert one.images[0].source == png(0)


def test_a_caption_is_looked_for_in_the_json_where_the_txt_is_blank(tmp_path):
    about = json.dumps({"caption": "from json"}).encode()
    sample = [("a.png", png(1)), ("a.txt", b" \n"), ("a.json", about)]
    assert contents(read_tar(tmp_path / "a.tar", tar_of(sample))) == [(png(1), "from json")]
    for nothing in (b"{}", b'{"caption": null}', b'{"caption": " "}'):
        [item] = read_tar(tmp_path / "b.tar", tar_of([*sample[:2], ("a.json", nothing)]))
        assert item.rule == "short_caption"


def test_links_and_devices_in_tars_are_refused(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        kinds = {"a.png": tarfile.SYMTYPE, "b.png": tarfile.LNKTYPE, "c.png": tarfile.CHRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    found = read_tar(tmp_path / "a.tar", buffer.getvalue())
    assert len(found) == 3 and all("is a link" in str(i) or "no ordinary" in str(i) for i in found)
    assert "damaged or cut" in str(read_tar(tmp_path / "b.tar", b"no tar at all" * 100)[0])


# ---- Manifests, Parquet, pickles ----


def test_with_a_manifest_no_changed_bit_is_silent(tmp_path, caplog):
    data = tar_of(pairs(4))
    (tmp_path / "0.tar").write_bytes(data)
    assert len(read("webdataset", tmp_path / "0.tar")) == 4 and "go unnoticed" in caplog.text
    caplog.clear()
    (tmp_path / MANIFEST).write_bytes(manifest_bytes(manifest_of(str(tmp_path), [str(tmp_path / "0.tar")])))
    assert len(contents(read("webdataset", tmp_path / "0.tar", image_first_share=1))) == 4
    assert not caplog.text
    rng = random.Random(2)
    for number in range(60):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "0.tar").write_bytes(flipped)
        # Times of files may be coarse, and these are written faster than anybody changes a corpus.
        os.utime(tmp_path / "0.tar", ns=(number, number))
        [why] = read("webdataset", tmp_path / "0.tar")
        assert "SHA-256" in str(why) and MANIFEST in str(why)
    (tmp_path / "0.tar").write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"found {len(data) - 1} bytes, expected {len(data)}"):
        check_against_manifest(str(tmp_path / "0.tar"))


def table(path: Path, rows: list[dict]):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    columns = pyarrow.Table.from_pylist(rows)
    parquet.write_table(columns, buffer, row_group_size=2, write_page_checksum=True)
    path.write_bytes(buffer.getvalue())
    return str(path)


def test_obelics_rows_are_checked_one_by_one(tmp_path):
    import hashlib

    address = "https://x.org/1.jpg"
    name = hashlib.sha256(address.encode()).hexdigest()
    (tmp_path / f"{name}.png").write_bytes(png(1))
    rows = [
        {"texts": ["a", None, None], "images": [None, address, "https://x.org/gone.jpg"]},
        {"texts": ["a", "b"], "images": [None, address]},
        {"texts": ["a"], "images": [None, None]},
        {"texts": [None, "a"], "images": [None, None]},
        {"texts": ["a"], "images": [None]},
        {"texts": [None, "z"], "images": ["https://x.org/gone.jpg", None]},
    ]
    path = table(tmp_path / "a.parquet", rows)
    found = read("obelics", path)
    assert found[0].meta == {"missing_images": 1} and len(found[0].parts) == 2
    assert "row group 0, row 1: texts[1]: found both" in str(found[1])
    assert "found 1 items, expected 2" in str(found[2]) and "found neither" in str(found[3])
    assert [found[4].rule, found[5].rule] == ["no_image", "missing_images"]
    source = make_source("obelics", {"paths": path})
    [shard] = source.shards()
    assert shard.num_items == 6
    for start in range(7):
        assert [item for _, item in source.read(shard, start)] == found[start:]


def test_obelics_tables_may_hold_the_images(tmp_path):
    rows = [{"texts": ["a", None], "images": [None, {"bytes": png(3), "path": None}]}]
    [one] = read("obelics", table(tmp_path / "a.parquet", rows))
    assert one.images[0].load().getpixel((0, 0)) == (3, 0, 0)


def test_damaged_parquet_is_named(tmp_path):
    rows = [{"texts": [f"some text {n}", None], "images": [None, "1.png"]} for n in range(6)]
    (tmp_path / "1.png").write_bytes(png(1))
    data = Path(table(tmp_path / "a.parquet", rows)).read_bytes()
    whole = read("obelics", tmp_path / "a.parquet")
    assert len(whole) == 6
    rng = random.Random(3)
    for number in range(60):
        flipped = bytearray(data)
        # The footer, at the end, has no check sum of its own: some changes there mean nothing wrong.
        is_in_pages = number % 2 == 0
        flipped[rng.randrange(len(data) // 3 if is_in_pages else len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / "b.parquet"
        path.write_bytes(flipped)
        found = read("obelics", path)
        same = [one.parts == getattr(item, "parts", None) for one, item in zip(whole, found, strict=False)]
        is_named = isinstance(found[-1], BrokenItem)
        assert is_named or not is_in_pages or (len(found) == 6 and all(same))
    for text in (b"x", b"PAR1", data[:-20]):
        (tmp_path / "c.parquet").write_bytes(text)
        [why] = read("obelics", tmp_path / "c.parquet")
        assert "c.parquet" in str(why) and "damaged" in str(why)
    other = table(tmp_path / "d.parquet", [{"url": "x"}])
    assert "expected texts and images too" in str(read("obelics", other)[0])


class Evil:
    """Would run a program when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_pickles_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    for protocol in (0, 2, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": [Evil(canary)]}, protocol))
        with pytest.raises(InputError, match="not allowed"):
            read_pickled(tmp_path / "a.pkl")
    np.save(tmp_path / "a.npy", np.array([Evil(canary)], dtype=object))
    with pytest.raises(InputError, match="not allowed"):
        read_pickled(tmp_path / "a.npy")
    for name in ("builtins.eval", "os.getcwd", "builtins.getattr", "numpy.load", "functools.partial"):
        module, _, attribute = name.rpartition(".")
        (tmp_path / "b.pkl").write_bytes(f"c{module}\n{attribute}\n.".encode())
        with pytest.raises(InputError, match=f"{name}, which is not allowed"):
            read_pickled(tmp_path / "b.pkl")
    assert not canary.exists()


def test_damaged_pickles_are_refused_in_one_sentence(tmp_path):
    data = pickle.dumps({"a": np.arange(5), "b": ["x", b"y", 3.5, None], "c": np.float64(2)}, 2)
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    assert read_pickled(path) == {"a": [0, 1, 2, 3, 4], "b": ["x", "y", 3.5, None], "c": 2.0}
    for cut in range(0, len(data) - 1, 7):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"a\.pkl: refused or damaged"):
            read_pickled(path)


def test_shards_name_records_and_read_nothing_before_they_are_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text("no JSON at all")
    source = make_source("documents", {"paths": str(tmp_path / "a.jsonl")})
    assert source.shards() == [Shard(str(tmp_path / "a.jsonl"))]
    assert not isinstance(next(iter(read_records(source.shards()[0].name)))[1], Record)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_folder_of_images_that_is_not_there_stops_at_the_start(tmp_path, name):
    path = tmp_path / "a.json"
    path.write_text("[]")
    if "images" in SOURCES[name].__dataclass_fields__:
        with pytest.raises(UsageError, match="no such folder"):
            make_source(name, {"paths": str(path), "images": f"{tmp_path}/gone"}).shards()


def test_tables_longer_than_a_record_are_still_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [], "annotations": []}))
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 10)
    assert source_name_of(str(path)) == "captions"
