"""What the README says is so: its commands, its Python, its links, with the shipped model."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.cli.main import run
from mm_interleaved.storyworld.oracle import read_scene

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_two_commands_set_everything_up():
    main_job, tests = blocks("bash")
    for block in (main_job, tests):
        assert "https://download.pytorch.org/whl/cpu" in block and "-c constraints.txt" in block
    assert tests.strip().endswith("pytest")


@pytest.fixture(scope="module")
def main_job(tmp_path_factory) -> Path:
    """The output of the README's first command."""
    words = shlex.split(blocks("bash")[0].replace("\\\n", " ").split("&&")[-1])
    assert words[0] == "mm-interleaved"
    out = tmp_path_factory.mktemp("readme") / "story"
    words[words.index("-o") + 1] = str(out)
    arguments = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words[1:]]
    assert run(arguments) == 0
    return out


def test_main_job_tells_and_draws_a_story(main_job):
    [record] = [json.loads(line) for line in (main_job / "results.jsonl").open(encoding="utf-8")]
    assert [part["type"] for part in record["content"]] == ["text", "image"] * 4
    new = record["content"][2:]
    assert all(part["generated"] and isinstance(part["seed"], int) for part in new)
    assert all(len(part["text"].split()) >= 2 for part in new if part["type"] == "text")
    pictures = [PILImage.open(main_job / part["image"]) for part in new if part["type"] == "image"]
    assert all(
        picture.size == (64, 64) and len(picture.getcolors(4096) or range(9999)) > 8 for picture in pictures
    )
    assert (main_job / "index.html").stat().st_size > 10_000


def test_main_job_can_be_replayed(main_job, capsys):
    assert run(["replay", str(main_job / "manifest.json")]) == 0
    assert "1 of 1 records and 4 of 4 images are the same" in capsys.readouterr().out


def test_python_example_runs(capsys):
    [example] = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def red_dogs_with_blue_party_hats(picture: PILImage.Image) -> int:
    figures = read_scene(np.asarray(picture)).figures
    looks = [(f.species, f.body_colour, f.hat_colour) for f in figures]
    return looks.count(("dog", "red", "blue"))


def test_python_example_draws_what_it_tells():
    [example] = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    story = names["generator"].generate(names["story"], seed=0)
    assert [red_dogs_with_blue_party_hats(image.load()) for image in story.images] == [1, 1]


def test_commands_shown_work_and_use_words_that_the_model_knows(capfd, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    [shown] = blocks("console")
    commands = [shlex.split(line.removeprefix("$ mm-interleaved")) for line in shown.splitlines()]
    assert len(commands) >= 6
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    for command in commands:
        assert run(command) == 0, command
    assert not caplog.records and not capfd.readouterr().err
    assert (tmp_path / "out" / "duck.png").exists()


def test_every_command_named_is_there(capsys):
    assert run(["--help"]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^\| (`.*?`) \|", README, flags=re.MULTILINE)
    named = {words.split()[0] for row in rows for words in re.findall(r"`([^`]*)`", row)}
    assert len(named) >= 15
    assert not [name for name in named if not re.search(rf"\b{name}\b", told)]


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
