"""CONTRIBUTING.md and docs/architecture.md name files, functions, commands and storeys that exist."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from test_laws import GROUND, ROOMS

from mm_interleaved.cli.main import create_app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "mm_interleaved"
GUIDES = ("CONTRIBUTING.md", "docs/architecture.md", "README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in GUIDES}
STOREYS = r"^\| `(\w+)` \| (.*) \|$"


def ticked(text):
    """What stands in backticks, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def found(path):
    """A path of a guide, from the root or from the package; None where there is none."""
    return next((base / path for base in (ROOT, PACKAGE) if (base / path).exists()), None)


def paths_of(text):
    """(path, name in it or None) of all that look like files or folders."""
    pattern = re.compile(r"((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|py|toml|txt))(?:::(\w+))?")
    # Capitals stand for a name to be chosen; what a command writes is no file of ours.
    ours = [each for each in ticked(text) if not re.search(r"\b(NAME|X)\b", each) and each not in WRITTEN]
    return [(match[1], match[2]) for each in ours if (match := pattern.fullmatch(each))]


WRITTEN = {"images/", "out/story/index.html", "index.html"}


def defined_names(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


@pytest.mark.parametrize("guide", GUIDES)
def test_every_file_and_function_that_is_named_exists(guide):
    named = paths_of(TEXTS[guide])
    assert named or guide == "README.md"
    assert [path for path, _ in named if found(path) is None] == []
    wrong = [f"{path}::{name}" for path, name in named if name and name not in defined_names(found(path))]
    assert wrong == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_and_picture_is_there(guide):
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[guide]) if "://" not in link]
    assert [link for link in links if not (ROOT / guide).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_make_target_step_and_command_exists(guide):
    text = TEXTS[guide]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets
    registered = create_app().registered_commands
    commands = {command.name or command.callback.__name__ for command in registered} | {"data"}
    assert set(re.findall(r"mm-interleaved (\w[\w-]*)", text)) <= commands


def test_each_make_target_of_a_step_names_one_that_ci_knows():
    steps = re.findall(r"^\t\.ci/run (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert steps
    known = set(
        re.findall(r"^(\w+)\(\) \{", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {step for line in steps for step in line.split()} <= known


def test_a_step_that_ci_does_not_know_is_refused_with_those_it_knows():
    result = subprocess.run(["bash", ".ci/run", "everything"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "lint types tests parity" in result.stderr


def test_the_storeys_of_the_architecture_are_those_of_the_law():
    section = TEXTS["docs/architecture.md"].partition("## The storeys")[2].partition("\n## ")[0]
    rows = re.findall(STOREYS, section, re.MULTILINE)
    assert [name for name, _ in rows] == list(ROOMS)
    to_come = [name for name, what in rows if what.startswith("(to come)")]
    assert [name for name in ROOMS if not (PACKAGE / name).is_dir()] == to_come
    assert {Path(name).stem for name in re.findall(r"`(\w+\.py)`", section.partition("|")[0])} - {
        "test_laws"
    } <= GROUND
