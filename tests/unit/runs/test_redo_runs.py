"""One part of a finished run made again: a run of its own, nothing of the first one changed."""

import json
from dataclasses import replace

import pytest
from echo_runs import contents, echo_model, echo_request, nothing
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.generate import RunRequest, run_documents
from mm_interleaved.runs.manifest import read_manifest
from mm_interleaved.runs.redo import Redo, document_named, finished_documents, new_run_folder
from tiny import tiny_model, tiny_processor

FEW = {"num_inference_steps": 2, "max_new_tokens": 6, "do_sample": True}


def load_tiny(folder, *, device, dtype, acceleration=None):
    model = tiny_model()
    return InterleavedGenerator(model, tiny_processor(model.config))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run of two documents: (its folder, the model's)."""
    place = tmp_path_factory.mktemp("redo")
    model = echo_model(place)
    documents = [
        Document(id="a", parts=[Text("A."), Image(PILImage.new("RGB", (9, 7), (200, 30, 40)))], layout="T I"),
        Document(id="b", parts=[Text("B.")], layout="I"),
    ]
    choice = ModelChoice(name=str(model), device="cpu")
    request = RunRequest(documents=documents, output=place / "out", model=choice, flags=FEW)
    run_documents(request, nothing, load=load_tiny)
    return place / "out", choice


def redo_request(first, output, part=3, seed=9, **changes):
    folder, choice = first
    manifest = read_manifest(folder / "manifest.json")
    documents = finished_documents(folder, manifest)
    return RunRequest(
        documents=documents,
        output=output,
        model=choice,
        flags={**manifest["flags"], "seed": seed},
        redo=Redo(document="a", part=part, **changes),
        batch_size=1,
    )


def records(folder):
    return {record["id"]: record for record in map(json.loads, (folder / "results.jsonl").open())}


@pytest.mark.parametrize("part", [2, 3])
def test_one_part_is_another_and_the_rest_is_kept(first, tmp_path, part):
    before = contents(first[0])
    run_documents(redo_request(first, tmp_path / "new", part), nothing, load=load_tiny)
    assert contents(first[0]) == before
    old, new = records(first[0]), records(tmp_path / "new")
    assert new["b"] == old["b"]
    for number, (was, now) in enumerate(zip(old["a"]["content"], new["a"]["content"], strict=True)):
        is_same = was == now
        if was["type"] == "image":
            files = [place / part["image"] for place, part in ((first[0], was), (tmp_path / "new", now))]
            is_same = is_same and files[0].read_bytes() == files[1].read_bytes()
        assert is_same == (number != part)
    manifest = read_manifest(tmp_path / "new" / "manifest.json")
    assert manifest["redo"] == {"document": "a", "part": part, "rest": "keep"}
    assert manifest["outputs"]["page"] and "redo" not in read_manifest(first[0] / "manifest.json")


def test_a_run_made_again_can_be_taken_up_and_is_the_same_to_the_bit(first, tmp_path):
    request = redo_request(first, tmp_path / "new", rest="again", part=2)
    run_documents(request, nothing, load=load_tiny)
    whole = contents(tmp_path / "new")
    lines = (tmp_path / "new" / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "new" / "results.jsonl").write_bytes(lines[1])
    outcome = run_documents(request, nothing, load=load_tiny)
    assert [record["id"] for record in outcome.made] == ["a"]
    assert contents(tmp_path / "new") == whole
    with pytest.raises(UsageError, match=r"holds another run \(redo.part was 2, is now 3\)"):
        run_documents(redo_request(first, tmp_path / "new", rest="again"), nothing, load=load_tiny)
    with pytest.raises(UsageError, match=r"redo.document was \"a\", is now not there"):
        run_documents(replace(request, redo=None), nothing, load=load_tiny)


def test_a_document_that_failed_is_left_out_and_said(tmp_path, caplog):
    from echo_generator import load_echo

    request = echo_request(tmp_path, echo_model(tmp_path))
    run_documents(request, nothing, load=load_echo)
    manifest = read_manifest(request.output / "manifest.json")
    found = finished_documents(request.output, manifest)
    assert [document.id for document in found] == ["a", "b/ü", "d"]
    assert "1 failed and are left out: c" in caplog.text
    assert found[2].target and found[2].target[0].load().size == (9, 7)
    # A text that was changed by hand is taken as it is, and said.
    path = request.output / "results.jsonl"
    path.write_text(path.read_text().replace("A story.", "My story."))
    assert finished_documents(request.output, manifest)[0].parts[0] == Text("My story.")
    assert "changed since the run ended" in caplog.text
    del manifest["outputs"]
    with pytest.raises(InputError, match="is not finished"):
        finished_documents(request.output, manifest)


def test_the_document_is_named_where_there_are_several(tmp_path):
    documents = [Document(id="pip"), Document(id="lulu")]
    assert document_named(documents, "pip", tmp_path) is documents[0]
    assert document_named(documents[:1], None, tmp_path) is documents[0]
    with pytest.raises(
        InputError, match="holds 2 documents, expected one of them with --document: pip, lulu"
    ):
        document_named(documents, None, tmp_path)
    with pytest.raises(InputError, match="no document 'lulo', did you mean 'lulu'"):
        document_named(documents, "lulo", tmp_path)


def test_each_new_folder_is_a_new_one(tmp_path):
    assert new_run_folder(tmp_path / "story") == (tmp_path / "story-redo-1", 1)
    (tmp_path / "story-redo-1").mkdir()
    assert new_run_folder(tmp_path / "story" / "") == (tmp_path / "story-redo-2", 2)
