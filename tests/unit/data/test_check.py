"""`data check` and `data convert` over any source: what is told, what is written, how they end."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mm_interleaved.cli import data as data_commands
from mm_interleaved.cli.main import run
from mm_interleaved.data.check import Inspection
from mm_interleaved.data.check_page import render_contact_sheet
from mm_interleaved.data.distributions import histogram, summary
from mm_interleaved.data.pickled_annotations import PICKLED
from mm_interleaved.data.registry import SOURCES, make_source
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.tokens.task_prompts import PROMPTS


@pytest.fixture
def pages(tmp_path) -> Path:
    """MMC4 pages: two sound ones, one with a missing, one with a broken image, one broken, one left out."""
    for number in range(3):
        PILImage.new("RGB", (10 + number, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"GIF89a")

    def page(*names: str) -> str:
        infos = [{"image_name": name, "matched_text_index": 0, "matched_sim": 0.5} for name in names]
        return json.dumps({"text_list": ["<b>One</b>.", "Two."], "image_info": infos})

    lines = [page("0.png", "1.png"), page("0.png", "2.png", "same.png"), page("1.png", "2.png", "gone.png")]
    lines += [page("0.png", "bad.png"), '{"text_list": [], "image_info": 3}', page()]
    path = tmp_path / "docs_shard_0_v2.jsonl"
    path.write_text("\n".join(lines))
    return path


def inspected(path: Path, **settings) -> Inspection:
    inspection = Inspection(str(path), count_tokens=lambda document: len(document.text), **settings)
    source = make_source("mmc4", {"paths": str(path)})
    assert len(list(inspection.items(source, source.shards()))) == 6
    return inspection


def test_an_inspection_counts_everything(pages):
    report = inspected(pages).report
    told = report.to_json()
    assert (told["documents"], told["texts"], told["images"]) == (4, report.num_texts, 9)
    assert (told["broken_items"], told["broken_images"], told["missing_images"]) == (1, 1, 1)
    assert told["repeated_images"] == 1 and told["filtered"] == {"no_similar_image": 1}
    assert report.shorter_sides == Counter({10: 4, 11: 2, 12: 2})
    assert report.images_a_document == Counter({2: 3, 3: 1}) and report.tokens.total() == 4
    broken = [str(item) for item in report.broken]
    assert "bad.png" in broken[0] and "GIF" in broken[0] and f"{pages}:5: image_info" in broken[1]
    # The accounting identity: every item is one of the three.
    assert report.num_documents + report.num_broken + sum(report.filtered.values()) == 6


def test_a_document_that_no_tokenizer_takes_is_broken_and_no_document(pages):
    def refuse(document):
        raise InputError("text: found what has no tokens")

    inspection = Inspection("refused", count_tokens=refuse)
    source = make_source("mmc4", {"paths": str(pages)})
    items = list(inspection.items(source, source.shards()))
    report = inspection.report
    assert (report.num_documents, report.num_broken, len(items)) == (0, 5, 6)
    assert "has no tokens" in str(report.broken[0])


def test_images_are_opened_only_where_they_are_wanted(pages):
    report = inspected(pages, opens_images=False, num_samples=1).report
    assert report.shorter_sides.total() < 9 and report.num_images == 9 and len(report.samples) == 1


def test_the_contact_sheet_needs_nothing_but_itself(pages):
    page = render_contact_sheet([inspected(pages).report]).decode()
    assert "<script" not in page and not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count('src="data:image/webp;base64,') == 8 and "cannot be opened" in page
    assert "&lt;b&gt;One&lt;/b&gt;." in page and "<b>One</b>" not in page
    for word in ("tokens a document", "images a document", "left out: no_similar_image", "missing images"):
        assert word in page


def test_samples_are_spread_and_the_same_each_time(tmp_path):
    path = tmp_path / "many.jsonl"
    lines = [{"id": str(n), "content": [{"type": "text", "text": f"text {n}"}]} for n in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for _ in range(2):
        inspection = Inspection("many", num_samples=20)
        source = make_source("documents", {"paths": str(path)})
        list(inspection.items(source, source.shards()))
        found.append([int(sample.id) for sample in inspection.report.samples])
    assert found[0] == found[1] and len(set(found[0])) == 20
    assert sum(number >= 150 for number in found[0]) in range(5, 16)


def test_histograms_cover_every_number_once():
    for numbers in ([5], [0, 1, 1, 7], list(range(1000)), [3, 2048], [10**6, 10**6 + 3]):
        counts = Counter(numbers)
        bars = histogram(counts)
        assert sum(count for *_, count in bars) == len(numbers) and len(bars) <= 17
        for number in numbers:
            assert sum(first <= number <= last for first, last, _ in bars) == 1
        told = summary(counts)
        assert told["min"] <= told["median"] <= told["p95"] <= told["max"]
    assert histogram(Counter()) == [] and summary(Counter()) == {}
    assert summary(Counter([1, 2, 3, 4]))["median"] == 2


def test_the_docs_name_every_format_and_only_settings_that_exist():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`(.+?)`", row[1])} == set(SOURCES)
    assert {name for name in PICKLED if name in text} == set(PICKLED)
    assert {name for name in PROMPTS if name.endswith("released")} <= set(re.findall(r"[\w-]+", text))
    settings = {field.name for source in SOURCES.values() for field in fields(source)}
    told = set(re.findall(r"`((?:min|max|num|is|one|split|single|image_first|lower|dense)_\w+)`", text))
    assert told and told <= settings


# ---- The commands ----


def test_check_tells_and_ends(capsys, tmp_path, pages):
    page = tmp_path / "sheet" / "index.html"
    assert run(["data", "check", str(pages), "--model", "none", "--page", str(page)]) == 3
    told = capsys.readouterr()
    assert "4 documents" in told.out and "1 left out (no_similar_image)" in told.out
    assert "bad.png" in told.err and f"{pages}:5" in told.err and page.is_file()
    assert run(["data", "check", str(pages), "--model", "none", "--json", "--limit", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 2 and figures["tokens"] == {}
    assert run(["data", "check", str(pages), "--model", "none", "--limit", "4"]) == 7
    capsys.readouterr()
    command = ["data", "check", str(pages), "--model", "none", "--limit", "1", "--set"]
    assert run([*command, "max_images=1"]) == 0
    assert "1 document, 2 texts, 1 image\n" in capsys.readouterr().out.replace("1 text,", "2 texts,")
    assert run([*command, "max_imges=1"]) == 2 and "did you mean 'max_images'" in capsys.readouterr().err
    assert run(["data", "check", str(pages), "--format", "mmc"]) == 2
    assert "did you mean 'mmc4'" in capsys.readouterr().err


def test_equal_faults_are_told_once_with_their_number(capsys, tmp_path):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    captions = [{"image_id": 1, "caption": number} for number in range(567)] + [
        {"image_id": "x", "caption": "c"}
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": captions}))
    assert run(["data", "check", str(path), "--model", "none"]) == 3
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"mm-interleaved: {path}: annotations[0].caption: found the number 0, expected a string (567 times)",
        f"mm-interleaved: {path}: annotations[567].image_id: found no image with this image_id",
    ]
    assert "568 broken items" in told.out
    assert run(["data", "check", str(path), "--model", "none", "--json"]) == 3
    figures = json.loads(capsys.readouterr().out)
    assert [fault["count"] for fault in figures["faults"]] == [567, 1] and len(figures["broken"]) == 2


def test_what_was_not_used_and_what_was_left_out_is_counted_by_name(capsys, tmp_path):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "A.", "score": 5}]
    blank = [turns[0], {"from": "gpt", "value": " "}]
    lines = [{"id": name, "image": "a.png", "conversations": turns, "source": "web"} for name in "abc"]
    lines += [{"id": name, "image": "a.png", "conversations": blank} for name in "de"]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "page.html"
    assert run(["data", "check", str(path), "--model", "none", "--page", str(page)]) == 0
    told = capsys.readouterr().out
    for words in (
        "2 left out (empty_answer)",
        f"3 with markup for images that matches no image, taken as text (first: {path}:1: document 'a')",
        "3 with unused field 'conversations[].score'",
        "3 with unused field 'source'",
    ):
        assert words in told
    assert "markup for images" in page.read_text() and "unused field" in page.read_text()
    assert run(["data", "check", str(path), "--model", "none", "--json"]) == 0
    remarks = json.loads(capsys.readouterr().out)["remarks"]
    assert remarks["unused field 'source'"] == {"count": 3, "first": f"{path}:1: document 'a'"}


@pytest.mark.parametrize(
    "data", [b'{"image": "a.png", "text": "x"}\n', b'[\n{"image": "a.png", "text": "x"}]']
)
def test_what_is_piped_in_is_read_like_a_file(capsys, tmp_path, monkeypatch, data):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for packed in (data, gzip.compress(data)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(packed)))
        data_commands._spooled.cache_clear()
        assert run(["data", "check", "-", "--model", "none"]) == 0
        told = capsys.readouterr()
        assert "-: 1 document, 1 text, 1 image\n" in told.out and not told.err
        assert run(["data", "convert", "-", "out.jsonl"]) == 0
        assert read_documents(tmp_path / "out.jsonl")[0].images[0].name == "a.png"


def test_one_storage_that_fails_does_not_end_the_inspection_of_others(capsys, tmp_path, pages):
    assert run(["data", "check", "ftp://127.0.0.1:9/x.jsonl", str(pages), "--model", "none"]) == 6
    told = capsys.readouterr()
    assert "ftp://127.0.0.1:9/x.jsonl: does not answer" in told.err and "4 documents" in told.out


def test_tokens_are_counted_as_the_model_counts_them(capsys, tmp_path):
    path = write_storyworld(tmp_path / "out", 2, 0, "test", "vist")
    assert run(["data", "check", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"]["min"] > 3 * 8 and figures["images_a_document"]["min"] >= 3


def test_a_manifest_is_written_and_then_checked(capsys, tmp_path):
    path = write_storyworld(tmp_path / "out", 2, 0, "test", "webdataset")
    assert run(["data", "check", str(path), "--model", "none", "--write-manifest"]) == 0
    shutil.copy(path, path.parent / "1.tar")
    assert run(["data", "check", str(path.parent / "1.tar"), "--model", "none", "--write-manifest"]) == 0
    assert set(json.loads((path.parent / "shards.json").read_text())["shards"]) == {"00000.tar", "1.tar"}
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    assert run(["data", "check", str(path), "--model", "none"]) == 3
    assert "expected SHA-256" in capsys.readouterr().err
    # What is broken is not sealed.
    (path.parent / "shards.json").unlink()
    (path.parent / "2.tar").write_bytes(data[:3000])
    assert run(["data", "check", str(path.parent / "2.tar"), "--model", "none", "--write-manifest"]) == 3
    assert not (path.parent / "shards.json").exists()


def test_convert_copies_images_as_they_are_each_once(capsys, tmp_path):
    path = write_storyworld(tmp_path / "out", 3, 0, "test", "coco")
    out = tmp_path / "new" / "captions.jsonl"
    assert run(["data", "convert", str(path), str(out)]) == 0
    assert "3 documents" in capsys.readouterr().out
    documents = read_documents(out)
    assert [one.id for one in documents] == ["captions:0", "captions:1", "captions:2"]
    originals = {file.read_bytes() for file in (tmp_path / "out" / "images").iterdir()}
    assert {file.read_bytes() for file in (out.parent / "images").iterdir()} == originals
    first = out.read_bytes()
    assert run(["data", "convert", str(path), str(out)]) == 0 and out.read_bytes() == first
    other = tmp_path / "other" / "captions.jsonl"
    assert run(["data", "convert", str(path), str(other), "--refer-to-images"]) == 0
    assert not (other.parent / "images").exists()
    assert read_documents(other, image_root=tmp_path)[0].images[0].load().size == (64, 64)


def test_convert_stops_at_what_is_broken_or_skips_it_by_name(capsys, tmp_path, pages):
    out = tmp_path / "new" / "a.jsonl"
    assert run(["data", "convert", str(pages), str(out)]) == 3
    assert "bad.png" in capsys.readouterr().err and not out.exists()
    assert not any(file.is_file() for file in out.parent.rglob("*"))
    assert run(["data", "convert", str(pages), str(out), "--skip-broken"]) == 7
    told = capsys.readouterr()
    assert "3 documents, 1 left out (no_similar_image), 2 broken" in told.out and "bad.png" in told.err
    assert len(read_documents(out)) == 3


def test_convert_does_not_write_over_what_it_reads(capsys, pages):
    assert run(["data", "convert", str(pages), f"{pages.parent}/./{pages.name}"]) == 2
    assert "is what is read" in capsys.readouterr().err


def test_ids_that_come_again_are_told_apart(capsys, tmp_path):
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([{"id": "x", "conversations": turns}] * 3))
    assert run(["data", "convert", str(path), str(tmp_path / "out.jsonl")]) == 0
    assert "2 with an id that was taken" in capsys.readouterr().out
    assert [one.id for one in read_documents(tmp_path / "out.jsonl")] == ["x", "x#2", "x#3"]


def test_pickles_become_lines_through_convert_only(capsys, tmp_path):
    (tmp_path / "following_cache4.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert (
        run(
            ["data", "convert", str(tmp_path), str(tmp_path / "o.jsonl"), "--format", "flintstonessv-pickles"]
        )
        == 3
    )
    told = capsys.readouterr().err
    assert "os.system, which is not allowed" in told and not (tmp_path / "o.jsonl").exists()
