"""Checkpoints: whatever stands where one should, the one before is used; a finished save is never dropped."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from faults.filesystem import KILLED, every_event, full_from, killed_at, limited
from line_stage import CONFIG, Line
from mm_interleaved.errors import ModelFileError, StorageError
from mm_interleaved.training import checkpoints as store
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.settings import StageConfig
from saved_checkpoints import load_newest_checkpoint

KEPT = StageConfig(
    steps=4, learning_rate=1e-2, save_every=2, log_every=1, keep_checkpoints=3, use_float16=True
)
STEPS = ("step-00000002", "step-00000004")


class Gentle(Line):
    """Its gradients are numbers in float16 too."""

    def compute_losses(self, batch):
        losses = super().compute_losses(batch)
        return type(losses)(losses.total * 1e-4, losses.named, losses.counts)


def train(folder, config=KEPT):
    train_stage(Gentle(), config, folder, seed=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two checkpoints, after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "line"
    train(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "line")
    return tmp_path / "line"


def forge(name, content):
    """A file of a checkpoint with other contents, and a manifest that agrees."""

    def change(place):
        data = content.encode() if isinstance(content, str) else content
        (place / name).write_bytes(data)
        manifest = json.loads((place / "manifest.json").read_text())
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (place / "manifest.json").write_text(json.dumps(manifest))

    return change


def forge_state(**changes):
    """The state with some fields changed, those of None left out."""

    def change(place):
        state = {**json.loads((place / "state.json").read_text()), **changes}
        kept = {name: value for name, value in state.items() if value is not None}
        forge("state.json", json.dumps(kept))(place)

    return change


def write(name, content):
    return lambda place: (place / name).write_text(content)


def without(name):
    return lambda place: (place / name).unlink()


def replaced_by(make):
    def change(place):
        shutil.rmtree(place)
        make(place)

    return change


def cut(place):
    path = place / "weights.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flip(place):
    path = place / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def folder_for(name):
    def change(place):
        (place / name).unlink()
        (place / name).mkdir()

    return change


def pipe_for(name):
    def change(place):
        (place / name).unlink()
        os.mkfifo(place / name)

    return change


DAMAGES = {
    "no manifest": without("manifest.json"),
    "no state": without("state.json"),
    "no weights": without("weights.safetensors"),
    "cut weights": cut,
    "a flipped bit": flip,
    "a file too many": write("notes.txt", "x"),
    "a file": replaced_by(lambda place: place.write_text("x")),
    "an empty folder": replaced_by(os.mkdir),
    "a pipe": replaced_by(os.mkfifo),
    "a link to nothing": replaced_by(lambda place: place.symlink_to("nowhere")),
    "a deep manifest": write("manifest.json", "[" * 100_000),
    "a manifest that is a list": write("manifest.json", "[]"),
    "a manifest without entries": write("manifest.json", "{}"),
    "a manifest of a file outside": write("manifest.json", '{"../../../etc/passwd": {"bytes": 1}}'),
    "a manifest of other entries": write("manifest.json", '{"state.json": 3, "weights.safetensors": []}'),
    "a manifest that is no text": lambda place: (place / "manifest.json").write_bytes(b"\xff\xfe"),
    "a folder for the manifest": folder_for("manifest.json"),
    "a folder for the state": folder_for("state.json"),
    "a pipe for the manifest": pipe_for("manifest.json"),
    "a pipe for the state": pipe_for("state.json"),
    "a state with an endless number": forge("state.json", '{"step": 4, "threads": Infinity}'),
    "a deep state": forge("state.json", "[" * 100_000),
    "a state that is a list": forge("state.json", "[]"),
    "a state that is a number": forge("state.json", "4"),
    "a state that is no JSON": forge("state.json", "step: 4"),
    "a state without step": forge_state(step=None),
    "a state of another step": forge_state(step=400),
    "a step of another kind": forge_state(step="4"),
    "a step that is a truth": forge_state(step=True),
    "no stream": forge_state(stream=None),
    "a stream of another kind": forge_state(stream=[1]),
    "a stream of other fields": forge_state(stream={"rows": 4}),
    "a loss scale of another kind": forge_state(loss_scale=3),
    "a loss scale of other fields": forge_state(loss_scale={"factor": "big", "good_steps": 0}),
    "a loss scale of zero": forge_state(loss_scale={"factor": 0, "good_steps": 0}),
    "threads of another kind": forge_state(threads={"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, trained, caplog, damage):
    damage(folder / STEPS[1])
    train(folder)
    assert f"{STEPS[1]}: not a" in caplog.text and "the checkpoint of step 2 is used" in caplog.text
    assert f"now damaged-{STEPS[1]}" in caplog.text
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"damaged-{STEPS[1]}", "log.jsonl", *STEPS]
    again, wanted = (load_newest_checkpoint(place) for place in (folder, trained))
    weights = again.tensors["weights"]
    assert again.step == 4
    assert all(torch.equal(tensor, weights[name]) for name, tensor in wanted.tensors["weights"].items())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_none_is_whole_the_run_ends_with_4_and_changes_nothing(folder, damage):
    for step in STEPS:
        damage(folder / step)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelFileError, match=r"is whole: .*step-00000004.*step-00000002") as failed:
        train(folder)
    assert failed.value.exit_code == 4
    assert sorted(folder.rglob("*")) == before


def test_a_log_without_any_checkpoint_is_told_of(folder, caplog):
    for name in STEPS:
        shutil.rmtree(folder / name)
    train(folder)
    assert "log.jsonl has a line of step 4 and no checkpoint is there; beginning at step 0" in caplog.text
    caplog.clear()
    train(folder)
    assert "beginning at step 0" not in caplog.text


def test_whoever_only_reads_is_told_and_puts_nothing_aside(folder, caplog):
    (folder / STEPS[1] / "manifest.json").unlink()
    assert store.newest_checkpoint(folder).step == 2
    assert f"{STEPS[1]}/manifest.json: cannot be read" in caplog.text
    assert (folder / STEPS[1]).is_dir()


def test_a_second_damaged_checkpoint_does_not_overwrite_the_first(folder):
    for _ in range(2):
        (folder / STEPS[1] / "manifest.json").unlink()
        train(folder)
    assert {f"damaged-{STEPS[1]}", f"damaged-2-{STEPS[1]}", *STEPS} < {path.name for path in folder.iterdir()}


def test_a_save_over_something_of_its_name_is_not_dropped(tmp_path, caplog):
    """Somebody copies a folder there while the run is at work."""
    (tmp_path / STEPS[1]).mkdir()
    tensors = {"weights": {"w": torch.ones(2)}}
    place = store.save_checkpoint(tmp_path, store.Checkpoint(4, tensors, {}))
    assert store.newest_checkpoint(tmp_path).step == 4 and place.name == STEPS[1]
    assert f"damaged-{STEPS[1]}" in caplog.text


def test_names_that_are_none_of_ours_are_left_alone(folder):
    for name in ("step-4.bak", "step-00000009 (copy)", "step-x", "xstep-00000009", "step-"):
        (folder / name).mkdir()
    assert store.newest_checkpoint(folder).step == 4
    train(folder, StageConfig(**{**vars_of(KEPT), "steps": 6, "keep_checkpoints": 1}))
    assert store.newest_checkpoint(folder).step == 6
    assert {"step-4.bak", "step-x"} < {path.name for path in folder.iterdir()}


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def vars_of(config):
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", "[" * 100_000),
        ("log.jsonl", '[]\n{"step": "x"}\n3\n'),
        ("log.jsonl", b"\xff\xff\n"),
        ("log.jsonl", None),
        (".tmp-step-00000006", "a file"),
        (".del-step-00000001", "a file"),
    ],
)
def test_a_log_or_a_leftover_of_another_form_stops_nothing(folder, name, content):
    path = folder / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    train(folder, StageConfig(**{**vars_of(KEPT), "steps": 6}))
    assert store.newest_checkpoint(folder).step == 6
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()][-2:] == [
        5,
        6,
    ]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path):
    (tmp_path / "line").write_text("a file")
    with pytest.raises(StorageError, match="line: cannot be read"):
        train(tmp_path / "line")


def test_a_run_shorter_than_the_steps_between_two_lines_logs_its_end(tmp_path):
    train(tmp_path, StageConfig(steps=3, learning_rate=1e-2, log_every=20))
    assert logged(tmp_path) == [3]


def test_a_disk_that_is_full_from_any_moment_on_ends_with_6_and_keeps_what_was_saved(tmp_path):
    def attempt(number):
        place = tmp_path / str(number)
        return full_from(number, lambda: train_stage(Line(), CONFIG, place, seed=3), tmp_path)

    saved = 0
    for number, ending in every_event(attempt, least=60):
        assert ending == 6, f"event {number}"
        place = tmp_path / str(number)
        if place.exists():
            checkpoint = store.newest_checkpoint(place)
            now = 0 if checkpoint is None else checkpoint.step
            assert now >= saved, f"event {number}"
            saved = now
        if number % 8 == 0:
            train_stage(Line(), CONFIG, place, seed=3)
            assert store.newest_checkpoint(place).step == 4


@pytest.mark.parametrize("num_bytes", [0, 50, 120, 200, 400])
def test_checkpoint_files_that_cannot_grow_end_with_6(tmp_path, num_bytes):
    assert limited(num_bytes, lambda: train_stage(Line(), CONFIG, tmp_path, seed=3)) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name != "log.jsonl"] == []
    train_stage(Line(), CONFIG, tmp_path, seed=3)
    assert store.newest_checkpoint(tmp_path).step == 4


def test_killed_while_damaged_checkpoints_are_put_aside_nothing_whole_is_lost(trained, tmp_path):
    def attempt(number):
        place = tmp_path / str(number)
        shutil.copytree(trained, place)
        (place / STEPS[1] / "state.json").unlink()
        return killed_at(number, lambda: train(place), tmp_path)

    for number, code in every_event(attempt, least=20):
        assert code == KILLED
        assert store.newest_checkpoint(tmp_path / str(number)).step in (2, 4)
        train(tmp_path / str(number))
        assert store.newest_checkpoint(tmp_path / str(number)).step == 4
