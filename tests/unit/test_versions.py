"""The set of libraries is pinned whole, the bounds are honest, and what was never tried is said."""

import importlib.util
import logging
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mm_interleaved import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [
    Requirement(line)
    for line in PROJECT["dependencies"] + [line for lines in EXTRAS.values() for line in lines]
    if not line.startswith(PROJECT["name"])
]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.fixture
def compat():
    spec = importlib.util.spec_from_file_location("compat", ROOT / ".ci" / "compat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("requirement", ASKED, ids=lambda each: each.name)
def test_every_direct_dependency_and_extra_is_pinned_within_its_bounds(requirement):
    assert requirement.name in pins(), "constraints.txt does not pin it"
    assert requirement.specifier.contains(pins()[requirement.name])


@pytest.mark.parametrize("requirement", ASKED, ids=lambda each: each.name)
def test_every_dependency_has_a_lowest_and_an_upper_bound(requirement):
    # fsspec counts in dates, of which none is known beforehand.
    upper = {"<"} if requirement.name != "fsspec" else set()
    assert {clause.operator for clause in requirement.specifier} == {">="} | upper


def test_the_constraints_hold_pins_and_the_two_that_must_not_come():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if line and not line.startswith("#") and "==" not in line]
    assert others == ["torchvision<0.1", "torchaudio<0.1"]


def test_the_lowest_set_is_that_of_the_lower_bounds(compat):
    lowest = dict(
        line.split("==") for line in compat.constraints("lowest", PROJECT, "2.13.0") if "==" in line
    )
    assert lowest.pop("torch") == "2.13.0"
    of_dev = {each.name: each for each in ASKED if each.name in lowest}
    assert {"transformers", "diffusers", "peft", "pytest", "triton", "matplotlib"} <= of_dev.keys()
    for name, version in lowest.items():
        floor = next(clause.version for clause in of_dev[name].specifier if clause.operator == ">=")
        assert Version(version) == Version(floor)


def test_what_is_newer_or_older_than_any_that_was_tried_is_said_in_a_sentence(monkeypatch):
    installed = {"a": "1.25.3", "b": "1.1.0+cpu", "c": "1.24.9", "d": "1.25.0rc1", "e": None}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    sentences = versions.untried([Requirement(f"{name}>=1.17,<1.25") for name in installed])
    assert [sentence.split()[0] for sentence in sentences] == ["a", "b", "d"]
    assert re.search(r"a 1\.25\.3 is not among .*<1\.25,>=1\.17", sentences[0])


def test_the_bounds_are_read_from_the_metadata_of_the_package():
    names = {each.name for each in versions.requirements()}
    assert {"torch", "transformers", "diffusers"} <= names and not names & {"pytest", "peft"}


def test_a_model_that_is_loaded_says_once_what_was_never_tried(monkeypatch, caplog, tmp_path):
    from tiny import tiny_model

    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(versions, "untried", lambda: ["transformers 9.0 is not among the versions"])
    versions.warn_of_untried.cache_clear()
    model = type(tiny_model())
    with caplog.at_level(logging.WARNING):
        model.from_pretrained(tmp_path)
        model.from_pretrained(tmp_path)
    versions.warn_of_untried.cache_clear()
    assert [each.message for each in caplog.records if "9.0" in each.message] == [
        "transformers 9.0 is not among the versions"
    ]


def test_the_version_is_the_one_that_is_published():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert versions.__version__ == project["version"]
