"""A run of `generate`: killed, on a full disk, damaged by hand; what it holds is right or made again."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
from echo_generator import load_echo
from PIL import Image as PILImage

from faults.filesystem import KILLED, every_event, full_from, killed_at, limited
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError, StorageError, escape
from mm_interleaved.files import put_aside
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.folder import changed_files, check_input
from mm_interleaved.runs.generate import RunRequest, run_documents
from mm_interleaved.runs.manifest import read_manifest
from tiny import tiny_config


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    """A picture that is given, one of a message, one that is drawn; a document that fails."""
    root = tmp_path_factory.mktemp("run")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(tiny_config().to_json_string(use_diff=False))
    picture = root / "given.png"
    PILImage.new("RGB", (9, 7), (200, 30, 40)).save(picture)
    documents = (
        Document(id="a", parts=(Text("A story."), Image(picture)), layout="T I"),
        Document(id="b/ü", parts=(Text("Hi", role="user"), Image(picture, role="user")), layout="I"),
        Document(id="c", parts=(Text("too long"),), meta={"title": "C"}),
    )
    model = ModelChoice(name=str(root / "model"), device="cpu")
    return RunRequest(documents=documents, output=root / "out", model=model)


@pytest.fixture(scope="module")
def finished(request_, quick_disk):
    """A finished run; not to be changed."""
    run(request_)
    return request_.output


@pytest.fixture
def copy(finished, request_, tmp_path):
    """A request whose run is finished, and may be changed."""
    shutil.copytree(finished, tmp_path / "out")
    return replace(request_, output=tmp_path / "out")


def run(request):
    return run_documents(request, lambda document, event: None, load=load_echo)


def contents(folder):
    """Everything that two runs of the same request must agree in."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json") and "/damaged-" not in str(path)
    }
    return files | {"outputs": read_manifest(folder / "manifest.json")["outputs"]}


def asides(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("damaged-*"))


@pytest.mark.parametrize("is_torn", [False, True], ids=["every event", "every torn file"])
def test_killed_at_any_moment_it_is_finished_to_the_same_bits(request_, finished, tmp_path, is_torn):
    def attempt(number):
        request = replace(request_, output=tmp_path / str(number))
        return killed_at(number, lambda: run(request), tmp_path, is_torn=is_torn)

    for number, code in every_event(attempt, least=12 if is_torn else 60):
        assert code == KILLED
        run(replace(request_, output=tmp_path / str(number)))
        assert contents(tmp_path / str(number)) == contents(finished), f"event {number}"
        assert not list((tmp_path / str(number)).rglob(".tmp-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_is_full_from_any_moment_on_ends_with_6_and_loses_nothing(
    request_, finished, tmp_path, code
):
    def attempt(number):
        request = replace(request_, output=tmp_path / str(number))
        return full_from(number, lambda: run(request), tmp_path, code)

    step = 1 if code == errno.ENOSPC else 9
    for number, ending in every_event(lambda number: attempt(number * step), least=60 // step):
        assert ending == 6, f"event {number}"
        assert not list((tmp_path / str(number * step)).rglob(".tmp-*")), f"event {number}"
        run(replace(request_, output=tmp_path / str(number * step)))
        assert contents(tmp_path / str(number * step)) == contents(finished), f"event {number}"


@pytest.mark.parametrize("num_bytes", [0, 1, 30, 100, 300, 700, 900])
def test_files_that_cannot_grow_end_with_6(request_, finished, tmp_path, num_bytes):
    request = replace(request_, output=tmp_path / "out")
    assert limited(num_bytes, lambda: run(request)) == 6
    run(request)
    assert contents(request.output) == contents(finished)


# ---- What was changed by hand ------------------------------------------------------------------------


def edit_pixel(folder):
    path = folder / "images" / "a_1.png"
    picture = PILImage.open(path)
    picture.putpixel((3, 3), (1, 2, 3))
    picture.save(path)


def edit_text(folder):
    path = folder / "results.jsonl"
    path.write_text(path.read_text().replace("A story.", "A lie."))


def cut_picture(folder):
    path = folder / "images" / "b___0.png"
    path = next(folder.glob("images/b_*_1.png")) if not path.exists() else path
    path.write_bytes(path.read_bytes()[:40])


def link_picture(folder):
    """To a file outside whose bytes are even right."""
    path = folder / "images" / "a_1.png"
    outside = folder.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def link_images(folder):
    (folder / "images").rename(folder.parent / "pictures")
    (folder / "images").symlink_to(folder.parent / "pictures")


def name_outside(folder):
    shutil.copy(folder / "images" / "a_1.png", folder.parent / "secret.png")
    path = folder / "results.jsonl"
    path.write_text(path.read_text().replace("images/a_1.png", "../secret.png"))


def name_outside_with_hash(folder):
    """The line and its hash both say it."""
    import hashlib

    name_outside(folder)
    line = (folder / "results.jsonl").read_bytes().splitlines()[0] + b"\n"
    hashes = [json.loads(text) for text in (folder / "hashes.jsonl").read_text().splitlines()]
    hashes[0]["line"] = hashlib.sha256(line).hexdigest()
    hashes[0]["images"]["../secret.png"] = hashes[0]["images"].pop("images/a_1.png")
    (folder / "hashes.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in hashes))


def other_form(text):
    def change(folder):
        (folder / "results.jsonl").write_text(text)

    return change


def other_hashes(text):
    def change(folder):
        (folder / "hashes.jsonl").write_text(text)

    return change


def folder_instead(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (path / "inside").mkdir(parents=True)
        (path / "inside" / "note").write_text("mine")

    return change


def file_instead(name):
    def change(folder):
        shutil.rmtree(folder / name)
        (folder / name).write_text("mine")

    return change


def pipe_instead(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


CHANGES = {
    "a pixel": edit_pixel,
    "a sentence": edit_text,
    "a cut picture": cut_picture,
    "a picture is a link": link_picture,
    "the images are a link": link_images,
    "a path outside": name_outside,
    "a path outside with its hash": name_outside_with_hash,
    "deep nesting": other_form("[" * 100_000),
    "a list": other_form("[1, 2]\n"),
    "a string": other_form('"a"\n'),
    "fields of other kinds": other_form('{"id": "a", "content": {"text": 3}}\n{"id": "c", "error": []}\n'),
    "parts of other kinds": other_form('{"id": "a", "content": [{"type": "image", "image": [1]}]}\n'),
    "no results": other_form(""),
    "hashes of another form": other_hashes('{"id": 3}\n[]\n"x"\n'),
    "hashes without images": other_hashes('{"id": "a", "line": "00", "images": []}\n'),
    "deep hashes": other_hashes('{"a":' * 100_000),
    "a folder for the results": folder_instead("results.jsonl"),
    "a folder for the hashes": folder_instead("hashes.jsonl"),
    "a folder for the page": folder_instead("index.html"),
    "a folder for a picture": folder_instead("images/a_1.png"),
    "a folder for the input": folder_instead("input/documents.jsonl"),
    "a file for the images": file_instead("images"),
    "a file for the input": file_instead("input"),
    "a file for the input's images": file_instead("input/images"),
    "a pipe for the results": pipe_instead("results.jsonl"),
    "a pipe for a picture": pipe_instead("images/a_1.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_put_aside_and_made_again(copy, finished, change):
    change(copy.output)
    before = {path: path.read_bytes() for path in copy.output.parent.glob("*.png")}
    run(copy)
    assert contents(copy.output) == contents(finished)
    assert {path: path.read_bytes() for path in before} == before, "what lies outside stays as it is"
    run_documents(copy, lambda document, event: None, load=None)  # nothing is left to do


@pytest.mark.parametrize(
    ("change", "aside"),
    [
        (edit_pixel, "images/damaged-a_1.png"),
        (edit_text, "damaged-results.jsonl"),
        (folder_instead("results.jsonl"), "damaged-results.jsonl"),
        (file_instead("input"), "damaged-input"),
    ],
)
def test_what_somebody_may_want_back_is_kept(copy, change, aside):
    change(copy.output)
    run(copy)
    assert asides(copy.output)[0] == aside
    change(copy.output)
    run(copy)
    assert len([name for name in asides(copy.output) if "/inside" not in name]) == 2


def test_a_run_of_an_earlier_version_is_checked_against_its_manifest(copy, finished):
    (copy.output / "hashes.jsonl").unlink()
    run_documents(copy, lambda document, event: None, load=None)
    assert contents(copy.output) == contents(finished)
    (copy.output / "hashes.jsonl").unlink()
    edit_pixel(copy.output)
    run(copy)
    assert contents(copy.output) == contents(finished)


MANIFESTS = {
    "deep": "[" * 100_000,
    "nested": '{"format": "mm-interleaved run 1", "model": ' + "[" * 500 + "]" * 500 + "}",
    "a list": "[]",
    "a string": '"mm-interleaved run 1"',
    "a format of another kind": '{"format": [["mm-interleaved run 1"]]}',
    "no JSON": "mm-interleaved run 1",
    "no UTF-8": b"\xff\xfe\x00",
    "empty": "",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_another_form_ends_with_one_sentence_and_can_be_put_aside(copy, finished, text):
    path = copy.output / "manifest.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"manifest\.json: .*--new-run") as refused:
        run(copy)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    run(replace(copy, new_run=True))
    assert (copy.output / "earlier" / "1" / "manifest.json").exists()
    assert contents(copy.output).keys() >= contents(finished).keys()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_no_file_in_the_manifests_place_is_refused(copy, make):
    (copy.output / "manifest.json").unlink()
    make(copy.output / "manifest.json")
    with pytest.raises(InputError, match="no regular file"):
        run(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 10**9),
        ("threads", True),
        ("acceleration", []),
        ("acceleration", {"adapter": {"folder": 3, "sha256": ""}}),
        ("acceleration", {"compile": "yes"}),
        ("outputs", {"records": [], "images": {}}),
        ("settings", 7),
    ],
)
def test_a_field_of_another_kind_is_named(copy, name, value):
    path = copy.output / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    if value is True:
        assert read_manifest(path)["threads"] == 1
        return
    with pytest.raises(InputError, match=rf"manifest\.json: {name}"):
        read_manifest(path)


def test_a_lock_that_is_no_file_is_a_fault_of_the_storage(copy, tmp_path):
    (copy.output / ".lock").unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (copy.output / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"\.lock"):
        run(copy)
    assert victim.read_text() == "precious"


# ---- Replay -------------------------------------------------------------------------------------------


def edit_page(folder):
    (folder / "index.html").write_text("<p>Nothing to see.</p>")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit_pixel, ["images/a_1.png"]),
        (edit_text, ["record 'a'"]),
        (edit_page, ["index.html"]),
        (link_picture, ["images/a_1.png"]),
        (other_form(""), ["record 'a'", "record 'b/ü'", "record 'c'"]),
        (lambda folder: None, []),
    ],
)
def test_replay_names_what_was_changed(copy, change, named):
    change(copy.output)
    assert changed_files(copy.output, read_manifest(copy.output / "manifest.json")) == named


@pytest.mark.parametrize("name", ["images/\0.png", "\ud800", "x" * 5000, "", "/", "../.."])
def test_replay_names_what_can_be_no_file_of_the_run(copy, name):
    manifest = read_manifest(copy.output / "manifest.json")
    manifest["outputs"]["images"][name] = manifest["outputs"]["page"]
    [named] = changed_files(copy.output, manifest)
    assert named == escape(name)


def test_replay_refuses_an_input_that_was_changed(copy):
    manifest = read_manifest(copy.output / "manifest.json")
    path = copy.output / "input" / "documents.jsonl"
    check_input(copy.output, manifest, read_documents(path))
    [picture] = (copy.output / "input" / "images").iterdir()
    PILImage.new("RGB", (9, 7)).save(picture)
    with pytest.raises(InputError, match="document 'a' is not the one of the run"):
        check_input(copy.output, manifest, read_documents(path))
    path.write_text(path.read_text().replace("too long", "too short"))
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[2:]))
    with pytest.raises(InputError, match="document 'a' is not the one"):
        check_input(copy.output, manifest, read_documents(path))


def test_nothing_that_is_put_aside_overwrites_anything(tmp_path):
    for text in "abc":
        (tmp_path / "x").write_text(text)
        put_aside(tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "damaged-x": "a", "damaged-2-x": "b", "damaged-3-x": "c",
    }  # fmt: skip
