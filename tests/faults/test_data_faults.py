"""Training data that is edited between a stop and `--resume` is named, whatever form it has."""

import json
import os
import shutil
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image as PILImage

from mm_interleaved.data.mixture import Mixture, MixtureSource
from mm_interleaved.data.registry import make_source
from mm_interleaved.data.sources.storyworld import StoryWorldSource
from mm_interleaved.data.storage.manifests import manifest_of
from mm_interleaved.errors import InputError, StorageError
from mm_interleaved.runs.ranks import ALONE
from mm_interleaved.training import data_files
from mm_interleaved.training.data_files import DATA_NAME, check_data


@pytest.fixture
def corpus(tmp_path):
    """Two files of documents with a picture each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in "ab":
        lines = []
        for number in range(3):
            name = f"{shard}{number}.png"
            PILImage.new("RGB", (6, 5), (number, 0, 0)).save(folder / name)
            content = [{"type": "image", "image": name}, {"type": "text", "text": f"text {number}"}]
            lines.append(json.dumps({"id": name, "content": content}) + "\n")
        (folder / f"{shard}.jsonl").write_text("".join(lines))
    return folder


def mixture(*patterns, kind="documents", **settings):
    source = make_source(kind, {"paths": [str(pattern) for pattern in patterns], **settings})
    return Mixture(sources=(MixtureSource(name="ours", source=source),))


def begin(folder, data):
    """A run that has saved something."""
    check_data(data, folder, ALONE)
    (folder / "step-00000001").mkdir(exist_ok=True)


def edit(path, old, new):
    status = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


EDITS = {
    "a word": (lambda corpus: edit(corpus / "b.jsonl", "text 1", "TEXT 1"), "b.jsonl"),
    "a line more": (lambda corpus: edit(corpus / "b.jsonl", "text 1", "text 1 and more"), "b.jsonl"),
    "a picture": (lambda corpus: PILImage.new("RGB", (6, 5), (9, 9, 9)).save(corpus / "b1.png"), "b1.png"),
    "a file more": (lambda corpus: shutil.copy(corpus / "a.jsonl", corpus / "c.jsonl"), "corpora.ours"),
    "a file fewer": (lambda corpus: (corpus / "b.jsonl").unlink(), "corpora.ours"),
    "another name": (lambda corpus: (corpus / "b.jsonl").rename(corpus / "bb.jsonl"), "corpora.ours"),
    "a picture fewer": (lambda corpus: (corpus / "b1.png").unlink(), "corpora.ours"),
}
CASES = [(name, is_large) for name in EDITS for is_large in (False, True)]
CASES.remove(("a word", True))
"""Of a large corpus, what keeps its size between two blocks is not seen."""


@pytest.mark.parametrize(("name", "is_large"), CASES)
def test_edited_data_is_named_and_the_same_is_not(corpus, tmp_path, monkeypatch, name, is_large):
    change, named = EDITS[name]
    if is_large:
        # Blocks that do not cover a file, but its first and its last bytes and some between.
        monkeypatch.setattr(data_files, "WHOLE_BYTES", 0)
        monkeypatch.setattr(data_files, "BLOCK_BYTES", 9)
    data = mixture(corpus / "*.jsonl")
    begin(tmp_path / "run", data)
    check_data(data, tmp_path / "run", ALONE)
    for path in corpus.iterdir():
        os.utime(path)  # touched alone
    check_data(data, tmp_path / "run", ALONE)
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    check_data(mixture(moved / "*.jsonl"), tmp_path / "run", ALONE)
    change(corpus)
    with pytest.raises(
        InputError, match=rf"{named}: .*run began.*a run goes on only with the data"
    ) as refused:
        check_data(data, tmp_path / "run", ALONE)
    assert refused.value.exit_code == 3


def test_data_may_be_edited_as_long_as_nothing_is_saved(corpus, tmp_path):
    data = mixture(corpus / "*.jsonl")
    check_data(data, tmp_path / "run", ALONE)
    EDITS["a word"][0](corpus)
    begin(tmp_path / "run", data)
    check_data(data, tmp_path / "run", ALONE)


def test_a_manifest_says_it_without_the_file_being_read(corpus, tmp_path, monkeypatch):
    listed = [str(corpus / "a.jsonl"), str(corpus / "b.jsonl")]
    (corpus / "shards.json").write_text(json.dumps(manifest_of(str(corpus), listed)))
    data = mixture(corpus / "*.jsonl")
    begin(tmp_path / "run", data)
    hashed = []
    real = data_files._hash
    monkeypatch.setattr(data_files, "_hash", lambda path, *more: hashed.append(path) or real(path, *more))
    check_data(data, tmp_path / "run", ALONE)
    assert hashed and not set(hashed) & set(listed)


def test_tars_tables_and_drawn_corpora(tmp_path):
    (tmp_path / "0.txt").write_text("a word")
    PILImage.new("RGB", (4, 4)).save(tmp_path / "0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("0.txt", "0.png"):
            archive.add(tmp_path / name, name)
    begin(tmp_path / "run", mixture(tmp_path / "a.tar", kind="webdataset"))
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek(512)
        file.write(b"A")
    with pytest.raises(InputError, match=r"a\.tar: changed since the run began: found sha256"):
        check_data(mixture(tmp_path / "a.tar", kind="webdataset"), tmp_path / "run", ALONE)
    drawn = Mixture(sources=(MixtureSource(name="drawn", source=StoryWorldSource(paths=("draw",))),))
    begin(tmp_path / "drawn", drawn)
    assert json.loads((tmp_path / "drawn" / DATA_NAME).read_text()) == {"corpora.drawn": []}


NOTES = [
    "[",
    "[" * 100_000,
    "[]",
    '{"corpora.ours": 3}',
    '{"corpora.ours": [[1, 2]]}',
    '{"corpora.ours": [["a", "b", 3]]}',
    None,
]


@pytest.mark.parametrize("text", NOTES)
def test_a_damaged_note_is_put_aside_with_a_warning(corpus, tmp_path, caplog, text):
    data = mixture(corpus / "*.jsonl")
    begin(tmp_path / "run", data)
    note = tmp_path / "run" / DATA_NAME
    whole = note.read_bytes()
    note.unlink()
    if text is None:
        note.mkdir()
    else:
        note.write_text(text)
    check_data(data, tmp_path / "run", ALONE)
    assert (
        "whether the data was changed is not known" in caplog.text
        and f"now damaged-{DATA_NAME}" in caplog.text
    )
    assert note.read_bytes() == whole


def test_ranks_end_together(corpus, tmp_path):
    """What the first finds is raised by all."""
    data = mixture(corpus / "*.jsonl")
    begin(tmp_path / "run", data)
    EDITS["a word"][0](corpus)
    told = []
    first = SimpleNamespace(is_first=True, gather=lambda error: told.append(error) or [error, None])
    with pytest.raises(InputError):
        check_data(data, tmp_path / "run", first)
    other = SimpleNamespace(is_first=False, gather=lambda error: [told[0], error])
    with pytest.raises(InputError, match=r"b\.jsonl"):
        check_data(data, tmp_path / "run", other)


def test_a_note_that_cannot_be_written_is_a_fault_of_the_storage(corpus, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError):
        check_data(mixture(corpus / "*.jsonl"), tmp_path / "run", ALONE)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "deep/tokenizer.json"])
def test_another_model_than_the_run_started_from_is_named(corpus, tmp_path, name):
    model = tmp_path / "model"
    for file in ("config.json", "model.safetensors", "deep/tokenizer.json", "notes.md"):
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_text("0000")
    data, run = mixture(corpus / "*.jsonl"), tmp_path / "run"
    check_data(data, run, ALONE, model=model)
    (run / "step-00000001").mkdir()
    (model / "notes.md").write_text("1111")
    check_data(data, run, ALONE, model=model)
    (model / name).write_text("0001")
    with pytest.raises(InputError, match=rf"model/{name}: changed since the run began"):
        check_data(data, run, ALONE, model=model)
    (model / name).unlink()
    with pytest.raises(InputError, match=r"start_from: other files .* found 2, expected 3"):
        check_data(data, run, ALONE, model=model)
