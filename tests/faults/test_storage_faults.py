"""What killed writers leave is removed by the next, and never what a living one is at; a full disk is told as
such.
"""

import errno
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stdout

import pytest
from PIL import Image as PILImage
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from faults.filesystem import KILLED, every_event, full_from, in_child, killed_at, limited
from mm_interleaved.cli.main import run as command
from mm_interleaved.data.convert import convert_source
from mm_interleaved.data.registry import make_source
from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.files import (
    locked_folder,
    make_folder,
    new_folder,
    remove_folder,
    remove_temporary_files,
    whole_file,
    write_file,
)


def fill(path):
    with new_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "config.json").write_text("{}")
        (temporary / "weights").write_bytes(b"0" * 3000)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_is_made_is_whole_or_not_there_and_the_next_attempt_cleans(tmp_path):
    path = tmp_path / "model"
    for _, code in every_event(lambda number: killed_at(number, lambda: fill(path), tmp_path), least=8):
        assert code == KILLED
        if path.exists():
            assert (path / "weights").stat().st_size == 3000
            remove_folder(path)
        fill(path)
        assert names(tmp_path) == ["model"]
        remove_folder(path)


def test_a_folder_on_a_full_disk_leaves_nothing(tmp_path):
    attempts = every_event(lambda number: full_from(number, lambda: fill(tmp_path / "m"), tmp_path), least=8)
    for _, code in attempts:
        # Where only its place could not be synced, it is there, and whole.
        assert code == 6 and names(tmp_path) in ([], ["m"])
        assert names(tmp_path) == [] or (tmp_path / "m" / "weights").stat().st_size == 3000
        remove_folder(tmp_path / "m")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    lines = []
    for number in range(3):
        PILImage.new("RGB", (6, 5), (number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "x"}]
        lines.append(json.dumps({"id": str(number), "content": content}) + "\n")
    (tmp_path / "in" / "corpus.jsonl").write_text("".join(lines))
    return make_source("documents", {"paths": [str(tmp_path / "in" / "corpus.jsonl")]})


def test_a_conversion_that_is_killed_leaves_nothing_that_the_next_does_not_clean(corpus, tmp_path):
    convert_source(corpus, tmp_path / "whole" / "out.jsonl")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert len(wanted) == 4

    def attempt(number):
        return killed_at(
            number, lambda: convert_source(corpus, tmp_path / str(number) / "out.jsonl"), tmp_path
        )

    for number, _ in every_event(attempt, least=20):
        out = tmp_path / str(number)
        convert_source(corpus, out / "out.jsonl")
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == wanted, number


def test_an_image_that_was_cut_after_a_conversion_is_copied_again(corpus, tmp_path):
    convert_source(corpus, tmp_path / "out" / "out.jsonl")
    [image, *_] = (tmp_path / "out" / "images").iterdir()
    whole = image.read_bytes()
    image.write_bytes(whole[:20])
    convert_source(corpus, tmp_path / "out" / "out.jsonl")
    assert image.read_bytes() == whole


@contextmanager
def living(work):
    """A child that is in the middle of some work, until the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work():
                os.write(writer, b"!")
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert os.read(reader, 1) == b"!"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("make", [whole_file, new_folder])
def test_what_a_living_writer_is_at_stays(tmp_path, make):
    path = tmp_path / "out"
    with living(lambda: make(path)):
        [at_work] = names(tmp_path)
        remove_temporary_files(tmp_path)
        with make(path):
            assert at_work in names(tmp_path) and len(names(tmp_path)) == 2
        assert names(tmp_path) == sorted([at_work, "out"])
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["out"]


def test_only_names_of_ours_are_removed(tmp_path):
    ours = [".tmp-1-model", ".tmp-99999-x"]
    others = [".tmp-mine", ".tmp-", ".tmp-12", "tmp-1-x", ".tmp-x-1", "x.tmp-1-y"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("")
    (tmp_path / ".tmp-5-link").symlink_to(tmp_path / "x.tmp-1-y")
    (tmp_path / ".tmp-6-folder" / "deep").mkdir(parents=True)
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == sorted([*others, ".tmp-5-link"])


def test_a_lock_on_a_full_disk_is_a_fault_of_the_storage(tmp_path):
    def work():
        with locked_folder(tmp_path):
            raise AssertionError("it was held")

    assert limited(0, work) == 6


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOLCK])
def test_a_lock_that_cannot_be_made_is_a_fault_of_the_storage_and_one_that_is_held_is_not(
    tmp_path, monkeypatch, code
):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    is_held = pytest.raises(UsageError, match="in use by process")
    with living(lambda: locked_folder(tmp_path)), is_held, locked_folder(tmp_path):
        pass
    monkeypatch.setattr("fcntl.flock" if code == errno.ENOLCK else "os.ftruncate", refuse)
    with pytest.raises(StorageError, match=r"\.lock: cannot be written"), locked_folder(tmp_path):
        pass


def write_tensors(folder):
    import torch

    save_file({"w": torch.zeros(5000)}, folder / "w.safetensors")


def write_tokenizer(folder):
    vocabulary = {str(number): number for number in range(3000)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("write", [write_tensors, write_tokenizer])
def test_a_full_disk_under_a_writer_in_rust_is_told_as_one(tmp_path, write):
    def work():
        with new_folder(tmp_path / "model") as temporary:
            write(temporary)

    assert limited(4000, work) == 6
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "storyworld", "{out}", "--documents", "2"],
        ["train", "grounding-storyworld", "-o", "{out}"],
        ["generate", "--text", "x", "-o", "{out}"],
        ["plan", "storyworld"],
    ],
)
@pytest.mark.parametrize("num_bytes", [0, 10])
def test_a_command_on_a_full_disk_ends_with_6_in_one_sentence(tmp_path, arguments, num_bytes):
    is_reading = arguments[0] == "plan"
    reader, writer = os.pipe()

    def work():
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            code = command([argument.format(out=tmp_path / "out") for argument in arguments])
        sys.stderr.flush()
        os._exit(code)

    code = limited(num_bytes, work)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    assert code == (0 if is_reading else 6), told
    assert told.count("\n") == (0 if is_reading else 1) and ("cannot be written" in told) != is_reading, told


def test_a_program_that_is_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "x", b"old")
    for _, code in every_event(
        lambda number: killed_at(number, lambda: write_file(tmp_path / "x", b"new"), tmp_path), least=3
    ):
        assert code == KILLED and (tmp_path / "x").read_bytes() in (b"old", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    assert in_child(lambda: make_folder(tmp_path / "x")) == 6
    assert in_child(lambda: make_folder(tmp_path / "x" / "y")) == 6
    assert in_child(lambda: make_folder(tmp_path / ("a" * 300))) == 6
