"""A run that is killed at any moment goes on to the same bits; a disk that is full costs nothing."""

import errno
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from line_stage import CONFIG, Line
from mm_interleaved.errors import NumericalError, StorageError, UsageError
from mm_interleaved.training import checkpoints as store
from mm_interleaved.training.loop import StoppedBySignal, train_stage
from saved_checkpoints import load_newest_checkpoint


def train(folder):
    train_stage(Line(), CONFIG, folder, seed=3)


def contents(folder):
    """Everything that two runs must agree in: final tensors, losses as written."""
    checkpoint = folder / "step-00000004"
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {f"{path.name}:{key}": file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tensors, [(line["step"], line["loss"]) for line in lines], sorted(p.name for p in folder.iterdir())


def killed_at(number, folder, *, torn=False):
    """Trains in a child that dies at the given event; False where it came to its end.

    Events are those of the file system that Python sees, and every tensor file, whose writer it does not see:
    before it is written, or (`torn`) when half of it is.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0
    save_file = store.save_file

    def happens(tensor_file=None):
        nonlocal count
        if count == number:
            if torn and tensor_file:
                os.truncate(tensor_file, tensor_file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def hook(event, arguments):
        is_write = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if (is_write or is_change) and str(folder) in str(arguments[0]):
            happens()

    def saving(tensors, path):
        if torn:
            save_file(tensors, path)
            happens(path)
        else:
            happens()
            save_file(tensors, path)

    try:
        store.save_file = saving
        if not torn:
            sys.addaudithook(hook)
        train(folder)
    finally:
        os._exit(0)


@pytest.mark.parametrize("torn", [False, True], ids=["every event", "every torn file"])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path, torn):
    train(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    assert wanted[2] == ["log.jsonl", "step-00000004"]
    number = 0
    while True:
        folder = tmp_path / f"killed-{number}"
        if not killed_at(number, folder, torn=torn):
            break
        saved = sorted(path.name for path in folder.glob("step-*"))
        if number % 4 == 0:
            killed_at(3, folder, torn=torn)  # a second crash, soon after the first
        train(folder)
        assert contents(folder) == wanted, f"event {number}, after which there was {saved}"
        number += 1
    # Four saves, in each: folder, three tensor files, state, manifest, renames, rotation; and the log.
    assert number >= (12 if torn else 50)


def test_there_is_always_a_good_checkpoint_once_there_was_one(tmp_path):
    seen = False
    for number in range(0, 200, 5):
        folder = tmp_path / f"killed-{number}"
        if not killed_at(number, folder):
            break
        good = store.newest_checkpoint(folder)
        assert good is not None or not seen, f"event {number}"
        seen = seen or good is not None
    assert seen


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_file = store.save_file
    count = 0

    def filling(tensors, path):
        nonlocal count
        count += 1
        if count == 8:  # in the third save
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(store, "save_file", filling)
    with pytest.raises(StorageError, match=r"step-00000003: .*No space left") as failed:
        train(tmp_path)
    assert failed.value.exit_code == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-00000002"]
    monkeypatch.setattr(store, "save_file", save_file)
    train(tmp_path)
    assert store.newest_checkpoint(tmp_path).step == 4


def test_an_average_that_is_asked_for_on_the_way_begins_with_the_weights_of_then(tmp_path):
    train_stage(Line(), replace(CONFIG, steps=3, learning_rate=1.0, ema_decay=0.0), tmp_path, seed=3)
    then = load_newest_checkpoint(tmp_path).tensors["weights"]
    train_stage(Line(), replace(CONFIG, steps=4, learning_rate=0.0, ema_decay=0.99), tmp_path, seed=3)
    average = load_newest_checkpoint(tmp_path).tensors["average"]
    assert all(torch.allclose(average[name], weight) for name, weight in then.items())


def test_other_weights_than_were_trained_cannot_go_on(tmp_path):
    train_stage(Line(), replace(CONFIG, steps=2), tmp_path, seed=3)
    changed = Line()
    changed.part.bias.requires_grad_(False)
    with pytest.raises(
        UsageError, match=r"other weights than are trained now; .*part\.bias; what trains cannot"
    ):
        train_stage(changed, CONFIG, tmp_path, seed=3)


class Broken:
    """A writer, and an observer, that fails."""

    every = 2

    def __init__(self):
        self.calls = 0

    def write(self, line):
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def __call__(self, step):
        self.calls += 1
        raise ValueError("nothing to draw")

    def close(self):
        pass


def test_what_only_looks_on_cannot_end_a_run(tmp_path, caplog):
    train(tmp_path / "whole")
    writer, observer = Broken(), Broken()
    train_stage(Line(), CONFIG, tmp_path / "run", seed=3, writers=(writer,), observers=(observer,))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert (writer.calls, observer.calls) == (1, 2), "a writer is left out once it failed"
    assert "Broken failed and gets no more lines (OSError" in caplog.text
    assert "Broken failed after step 4 (ValueError: nothing to draw)" in caplog.text


@pytest.mark.parametrize(("signals", "error"), [("TT", StoppedBySignal), ("II", KeyboardInterrupt)])
def test_a_second_signal_to_stop_waits_for_the_step_and_a_second_interrupt_does_not(tmp_path, signals, error):
    class Impatient(Line):
        def make_batch(self, step):
            for name in signals if step == 1 else ():
                os.kill(os.getpid(), {"T": signal.SIGTERM, "I": signal.SIGINT}[name])
            return super().make_batch(step)

    with pytest.raises(error):
        train_stage(Impatient(), CONFIG, tmp_path, seed=3)
    assert store.newest_checkpoint(tmp_path).step == (2 if error is StoppedBySignal else 1)
    train(tmp_path)
    assert store.newest_checkpoint(tmp_path).step == 4


class Gentle(Line):
    """Gradients that float16 holds even where the loss is scaled up as far as it is at first."""

    def compute_losses(self, batch):
        losses = super().compute_losses(batch)
        return replace(losses, total=losses.total * 1e-4)


class Steep(Gentle):
    """Its second gradient is more than float16 holds."""

    def make_batch(self, step):
        if step == 1:
            self.part.weight.register_hook(lambda gradient: gradient * float("inf"))
        return super().make_batch(step)


def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale_that_is_kept(tmp_path):
    config = replace(CONFIG, steps=2, use_float16=True, ema_decay=0.0)
    train_stage(Steep(), config, tmp_path, seed=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "skipped" not in lines[0] and lines[1]["skipped"] == 1
    saved = load_newest_checkpoint(tmp_path)
    assert saved.state["loss_scale"] == {"factor": 2.0**15, "good_steps": 0}
    # The scale goes on where it was; in float32 the same gradient ends the run.
    train_stage(Gentle(), replace(config, steps=3), tmp_path, seed=3)
    assert load_newest_checkpoint(tmp_path).state["loss_scale"] == {"factor": 2.0**15, "good_steps": 1}
    with pytest.raises(NumericalError, match="gradient norm"):
        train_stage(Steep(), replace(config, use_float16=False), tmp_path / "float32", seed=3)
