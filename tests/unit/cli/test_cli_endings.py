"""How commands end where no model is needed to see it."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from PIL import Image as PILImage
from transformers.utils import logging as transformers_logging

from mm_interleaved.cli import data as data_commands
from mm_interleaved.cli.main import create_app, run
from mm_interleaved.recipes.registry import RECIPES, Recipe
from mm_interleaved.recipes.run import run_recipe


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 40 bytes."),
            "40 bytes",
        ),
        (MemoryError(), ""),
    ],
)
def test_a_full_memory_is_no_bug(capsys, monkeypatch, tmp_path, error, size):
    def fail(path):
        raise error

    monkeypatch.setattr("mm_interleaved.data.registry.source_name_of", fail)
    (tmp_path / "in.jsonl").write_text("{}")
    assert run(["data", "convert", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    told = capsys.readouterr().err
    assert "memory" in told and size in told and "--dtype" in told and told.count("\n") == 1


def test_check_looks_at_every_file(capsys, tmp_path):
    PILImage.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    for name in ("good", "bad"):
        content = [{"type": "image", "image": f"{name}.png"}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"id": name, "content": content}))
    (tmp_path / "wrong.json").write_text("{")
    paths = {name: str(tmp_path / f"{name}.json") for name in ("good", "bad", "wrong")}

    assert run(["data", "check", paths["wrong"], paths["good"], paths["bad"]]) == 3
    told = capsys.readouterr()
    assert "wrong.json" in told.err and "bad.png" in told.err and "good.json: 1 document," in told.out
    assert run(["data", "check", paths["bad"], paths["good"]]) == 7
    assert run(["data", "check", paths["good"]]) == 0
    assert "Ends with 3" in (data_commands.check.__doc__ or "")


def test_arguments_are_named_in_capitals_and_help_breaks_no_line_of_its_own():
    pending, seen = [typer.main.get_command(create_app())], 0
    while pending:
        found = pending.pop()
        pending += getattr(found, "commands", {}).values()
        for parameter in found.params:
            if parameter.param_type_name == "argument":
                seen += 1
                assert parameter.metavar == parameter.metavar.upper(), (found.name, parameter.name)
        assert "\n" not in (found.help or "").replace("\n\n", ""), found.name
    assert seen > 20


def test_train_hides_the_bars_of_libraries(monkeypatch, tmp_path):
    def bars_are_shown(settings, folder, *, show_progress):
        return transformers_logging.is_progress_bar_enabled()

    recipe = Recipe(RECIPES["storyworld"].settings, bars_are_shown)
    transformers_logging.enable_progress_bar()
    for number, hides in enumerate((False, True)):
        out = tmp_path / str(number)
        assert (
            run_recipe("storyworld", out=out, show_progress=hides, recipes={"storyworld": recipe})
            is not hides
        )
