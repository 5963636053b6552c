"""A run's folder is finished by the same request, however it was interrupted, and refuses any other."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from echo_generator import EchoGenerator, load_echo
from echo_runs import contents, echo_model, echo_request, nothing, run
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError, NumericalError, StorageError, UsageError
from mm_interleaved.files import locked_folder, repair_tail
from mm_interleaved.generation.events import Failed, Finished
from mm_interleaved.runs.engine import default_batch_size
from mm_interleaved.runs.folder import file_stem, file_stems
from mm_interleaved.runs.generate import RunRequest, run_documents
from mm_interleaved.runs.manifest import read_manifest
from mm_interleaved.runs.results import image_paths


@pytest.fixture
def model(tmp_path) -> Path:
    return echo_model(tmp_path)


@pytest.fixture
def request_(tmp_path, model) -> RunRequest:
    return echo_request(tmp_path, model)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_results_hold_whole_documents_and_failures(request_):
    outcome = run(request_)
    assert (outcome.num_documents, outcome.num_failed) == (4, 1)
    first, second, failed, last = records(request_.output)
    assert [part["type"] for part in first["content"]] == ["text", "image", "text", "image"]
    assert "generated" not in first["content"][1]
    assert first["content"][3]["generated"] is True and isinstance(first["content"][3]["seed"], int)
    assert first["content"][3]["image"] == "images/a_1.png"
    error = {
        "code": "too_long",
        "field": "content",
        "message": "document: 9000 tokens, expected at most 2048",
    }
    assert failed == {"id": "c", "error": error}
    assert all(
        (request_.output / name).exists()
        for record in records(request_.output)
        for name in image_paths(record)
    )
    assert image_paths(last) == ["images/d_0.png"]
    assert second["id"] == "b/ü"


def test_results_can_be_read_as_documents(request_, tmp_path):
    run(request_)
    good = [json.dumps(record) for record in records(request_.output) if "error" not in record]
    (request_.output / "good.jsonl").write_text("\n".join(good))
    documents = read_documents(request_.output / "good.jsonl")
    assert [document.id for document in documents] == ["a", "b/ü", "d"]
    assert documents[0].parts[-1].generated


def test_seed_of_a_document_does_not_depend_on_its_neighbours(request_):
    run(request_)
    alone = replace(request_, documents=request_.documents[3:], output=request_.output.with_name("alone"))
    run(alone)
    assert records(alone.output)[0] == records(request_.output)[3]


def test_own_arguments_of_a_document_yield_to_flags(request_):
    own = replace(request_.documents[0], generation={"seed": 7, "layout": "I"}, layout=None)
    run(replace(request_, documents=[own]))
    assert records(request_.output)[0]["content"][-1]["seed"] == 7
    other = request_.output.with_name("other")
    run(replace(request_, documents=[own], output=other, flags={"layout": "T T"}))
    assert [part["type"] for part in records(other)[0]["content"][2:]] == ["text", "text"]


def test_wrong_argument_of_a_document_stops_before_anything_runs(request_):
    bad = replace(request_.documents[0], generation={"top_q": 1})
    with pytest.raises(InputError, match=r"document 'a': generation.*'top_q'.*'top_p'"):
        run(replace(request_, documents=[bad]))
    assert not request_.output.exists()


def test_rerun_does_nothing(request_):
    run(request_)
    before = contents(request_.output)
    outcome = run_documents(request_, nothing, load=None)  # pyright: ignore: nothing is pending, nothing is loaded
    assert outcome.num_already_finished == 4
    assert contents(request_.output) == before


def test_retry_makes_only_failed_documents_again(request_):
    run(request_)
    seen = []
    run_documents(
        replace(request_, retry_errors=True), lambda document, event: seen.append(document.id), load=load_echo
    )
    assert set(seen) == {"c"}
    assert [record["id"] for record in records(request_.output)] == ["a", "b/ü", "c", "d"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda r: replace(r, flags={"seed": 3}), "settings.seed was 0, is now 3"),
        (lambda r: replace(r, documents=r.documents[:2]), "input.c was .*, is now not there"),
        (lambda r: replace(r, model=replace(r.model, dtype="bfloat16")), 'dtype was "auto"'),
    ],
)
def test_another_run_in_the_same_folder_is_refused(request_, change, key):
    run(request_)
    before = contents(request_.output)
    with pytest.raises(UsageError, match=key):
        run(change(request_))
    assert contents(request_.output) == before
    run(replace(change(request_), new_run=True))
    assert (request_.output / "earlier" / "1" / "manifest.json").exists()


def test_other_threads_or_versions_are_told_but_not_refused(request_, caplog):
    run(request_)
    path = request_.output / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["threads"] += 1
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    (request_.output / "results.jsonl").unlink()
    run(request_)
    assert "torch was 1.0, is " in caplog.text and "threads was " in caplog.text


def test_changed_picture_is_a_changed_input(request_, tmp_path):
    run(request_)
    PILImage.new("RGB", (9, 7), (0, 0, 0)).save(tmp_path / "given.png")
    with pytest.raises(UsageError, match=r"input\.a"):
        run(request_)


def test_changed_model_is_refused(request_, model):
    run(request_)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model\.sha256"):
        run(request_)


def test_folder_with_other_things_is_refused(request_):
    request_.output.mkdir()
    (request_.output / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        run(request_)
    assert [path.name for path in request_.output.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_file_as_output_is_refused(request_):
    request_.output.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(request_)


def test_two_documents_of_one_id_are_refused(request_):
    with pytest.raises(InputError, match="documents 1 and 2"):
        run(replace(request_, documents=[request_.documents[0]] * 2))


def test_second_process_is_refused(request_):
    request_.output.mkdir()
    with locked_folder(request_.output), pytest.raises(UsageError, match=f"process {os.getpid()} on "):
        run(request_)


def test_full_disk_leaves_nothing_torn(request_, monkeypatch):
    """The write after the k-th fails, for every k; then the disk has space again."""
    whole = replace(request_, output=request_.output.with_name("whole"))
    run(whole)
    real_fsync, left = os.fsync, 0

    def full_after(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after)
    for number in range(100):
        left = number
        try:
            run(request_)
            break
        except StorageError as error:
            assert "No space left" in str(error)
            assert not list(request_.output.rglob(".tmp-*"))
    assert number >= 5
    assert contents(request_.output) == contents(whole.output)


def test_tail_inside_a_character_is_cut(tmp_path):
    path = tmp_path / "lines"
    line = '{"id": "ü"}'.encode()
    path.write_bytes(line + b"\n" + line[: line.index(b"\xc3") + 1])
    assert repair_tail(path) > 0
    assert path.read_bytes() == line + b"\n"


def test_missing_picture_is_made_again(request_):
    run(request_)
    wanted = contents(request_.output)
    (request_.output / "images" / "a_1.png").unlink()
    run(request_)
    assert contents(request_.output) == wanted


def test_broken_picture_fails_its_document_alone(request_, tmp_path):
    (tmp_path / "broken.png").write_bytes((tmp_path / "given.png").read_bytes()[:40])
    broken = Document(id="broken", parts=(Image(tmp_path / "broken.png"),))
    outcome = run(replace(request_, documents=[broken, *request_.documents[:1]]))
    assert outcome.num_failed == 1
    assert records(request_.output)[0]["error"]["code"] == "image"
    assert "content" in records(request_.output)[1]


@pytest.mark.parametrize("name", ["a", "../a", "a/b", "", ".", "CON?*", "ü" * 300, "a b"])
def test_file_stems_are_harmless_and_distinct(name):
    stem = file_stem(name)
    assert stem and not stem.startswith(".") and len(stem) < 100
    assert all(character.isascii() and (character.isalnum() or character in "._-") for character in stem)
    assert stem == name or stem != file_stem(stem + "x")


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"id": 3}', b'{"id": "a", "content": 5}', b"\xff"])
def test_damaged_line_of_the_results_is_made_again(request_, broken, caplog):
    run(request_)
    wanted = contents(request_.output)
    lines = (request_.output / "results.jsonl").read_bytes().splitlines()
    (request_.output / "results.jsonl").write_bytes(b"\n".join([broken, *lines[1:]]) + b"\n")
    run(request_)
    assert contents(request_.output) == wanted
    assert "results.jsonl:1" in caplog.text
    assert (request_.output / "damaged-results.jsonl").read_bytes() == broken + b"\n"


@pytest.mark.parametrize("name", ["model.name", "model.sha256", "threads", "outputs", "outputs.records"])
def test_damaged_field_of_a_manifest_is_named(request_, name):
    run(request_)
    path = request_.output / "manifest.json"
    manifest = json.loads(path.read_text())
    *above, last = name.split(".")
    (manifest[above[0]] if above else manifest)[last] = 0
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json: {name}: found "):
        read_manifest(path)


@pytest.mark.parametrize("new_run", [False, True])
def test_refused_folder_is_left_as_it_was(request_, new_run):
    request_.output.mkdir()
    (request_.output / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        run(replace(request_, new_run=new_run))
    assert [path.name for path in request_.output.iterdir()] == ["thesis.tex"]


def test_ids_that_differ_in_case_alone_share_no_file():
    stems = file_stems(["A", "a", "b", "B-1"])
    assert len({stem.casefold() for stem in stems.values()}) == 4
    assert (stems["b"], stems["B-1"]) == ("b", "B-1")


# ---- Batches -------------------------------------------------------------------------------------


def test_a_batch_has_the_same_documents_however_often_its_run_was_stopped(request_):
    """The last bits of a document depend on its neighbours, which must not depend on when a run stopped."""
    batches = []

    class Stopped(EchoGenerator):
        def __init__(self, after):
            self.after = after

        def stream_batch(self, documents, settings):
            batches.append([document.id for document in documents])
            for place, event in super().stream_batch(documents, settings):
                yield place, event
                if isinstance(event, Finished) and documents[place].id == self.after:
                    raise KeyboardInterrupt

    request = replace(request_, batch_size=3)
    for last in ("a", "b/ü"):
        with pytest.raises(KeyboardInterrupt):
            run_documents(request, nothing, load=lambda *a, last=last, **k: Stopped(last))
    run_documents(request, nothing, load=lambda *a, **k: Stopped(None))
    assert batches == [["a", "b/ü", "c"], ["a", "b/ü", "c"], ["a", "b/ü", "c"], ["d"]]
    whole = replace(request, output=request.output.with_name("whole"))
    run(whole)
    assert contents(request.output) == contents(whole.output)


def test_the_batch_size_of_a_run_stays_what_it_was(request_, monkeypatch):
    run(replace(request_, batch_size=2))
    manifest = request_.output / "manifest.json"
    assert read_manifest(manifest)["batch_size"] == 2
    run(request_)
    assert read_manifest(manifest)["batch_size"] == 2
    with pytest.raises(UsageError, match=r"holds another run \(batch_size was 2, is now 3\)"):
        run(replace(request_, batch_size=3))
    written = json.loads(manifest.read_text())
    for wrong in ("many", 0, True, 2.0, None):
        manifest.write_text(json.dumps(written | {"batch_size": wrong}))
        with pytest.raises(InputError, match=f"batch_size: found {wrong!r}, expected 1 or more"):
            run(request_)
    # Of before there were batches.
    del written["batch_size"]
    manifest.write_text(json.dumps(written))
    assert run(request_).num_already_finished == 4


def test_numbers_that_are_none_stop_a_run_when_the_others_of_their_batch_are_written(request_):
    class Broken(EchoGenerator):
        def stream_batch(self, documents, settings):
            for place, event in super().stream_batch(documents, settings):
                is_bad = documents[place].id == "a" and isinstance(event, Finished)
                yield place, Failed(NumericalError("no numbers")) if is_bad else event

    request = replace(request_, batch_size=3)
    with pytest.raises(NumericalError):
        run_documents(request, nothing, load=lambda *a, **k: Broken())
    assert [record["id"] for record in records(request.output)] == ["b/ü", "c"]
    assert run(request).num_already_finished == 2


def test_how_many_at_once_goes_by_the_device(monkeypatch):
    assert default_batch_size(torch.device("cpu")) == 8
    for gigabytes, expected in ((2, 1), (24, 6), (141, 16)):
        facts = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, facts=facts: facts)
        assert default_batch_size(torch.device("cuda")) == expected
