"""Tries the project with the lowest, the pinned and the newest libraries that it allows; prints a table.

    python .ci/compat.py [lowest] [pinned] [newest] [--folder DIR] [--torch VERSION]

Each set gets an environment of its own, runs the tests of equivalence and of the joints with stock libraries,
and the README's main job. Exit code 1 if anything failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("lowest", "pinned", "newest")
SHOWN = ("torch", "transformers", "diffusers", "huggingface-hub", "accelerate", "peft", "numpy", "pillow")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TESTS = (
    "tests/equivalence",
    "tests/unit/generation/test_loading.py",
    "tests/unit/tokens/test_processor.py",
    "tests/unit/checkpoint/test_compose.py",
    "tests/unit/test_versions.py",
)


@dataclass(slots=True)
class Outcome:
    """What came of one set."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = "not run"
    main_job: str = "not run"
    seconds: float = 0.0
    has_failed: bool = False


def direct_requirements(project: dict) -> list[str]:
    """The requirement lines of a `[project]` table and of its extra `dev`, each once."""
    extras = project["optional-dependencies"]
    lines, pending = list(project["dependencies"]), ["dev"]
    while pending:
        for line in extras[pending.pop()]:
            nested = re.match(rf"{re.escape(project['name'])}\[(.*)\]", line)
            if nested:
                pending += nested[1].split(",")
            elif line not in lines:
                lines.append(line)
    return lines


def constraints(name: str, project: dict, torch: str) -> list[str]:
    """The lines of a constraints file for a set; torch is the same in all, as few builds of it can be had."""
    if name == "pinned":
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        return [line if not line.startswith("torch==") else f"torch=={torch}" for line in lines]
    held = [f"torch=={torch}", "torchvision<0.1", "torchaudio<0.1"]
    if name == "newest":
        return held
    pairs = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line) for line in direct_requirements(project))
    return held + [f"{pair[1]}=={pair[2]}" for pair in pairs if pair and pair[1] != "torch"]


def pinned_torch() -> str:
    """The version that constraints.txt names."""
    found = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "constraints.txt pins no torch"
    return found[1]


def try_set(name: str, folder: Path, project: dict, torch: str) -> Outcome:
    """Install a set, run what must hold in it."""
    outcome, began = Outcome(name), time.monotonic()
    environment, log = folder / name, folder / f"{name}.log"
    held = folder / f"{name}.txt"
    held.write_text("\n".join(constraints(name, project, torch)) + "\n", encoding="utf-8")
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "-c", held]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if name == "newest" else []
    steps = (
        [sys.executable, "-m", "venv", environment],
        [*pip, "--no-deps", "--extra-index-url", CPU_INDEX, "torch"],
        [*pip, *upgrade, "-e", f"{ROOT}[dev]"],
    )
    for step in steps:
        if _run(step, log) != 0:
            outcome.tests, outcome.has_failed = f"cannot be installed, see {log}", True
            outcome.seconds = time.monotonic() - began
            return outcome
    outcome.versions = {package: _version(python, package) for package in SHOWN}
    code = _run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], log)
    outcome.tests = _last_line(log)
    story = folder / f"{name}-story"
    job = [environment / "bin" / "mm-interleaved", "generate", "examples/story.jsonl", "-o", story]
    job_code = _run(job, log)
    outcome.main_job = "done" if job_code == 0 else f"exit {job_code}"
    outcome.has_failed = code != 0 or job_code != 0
    outcome.seconds = time.monotonic() - began
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """One column a set."""
    rows = [("", *(each.name for each in outcomes))]
    rows += [(package, *(each.versions.get(package, "") for each in outcomes)) for package in SHOWN]
    rows.append(("tests", *(each.tests for each in outcomes)))
    rows.append(("main job", *(each.main_job for each in outcomes)))
    rows.append(("seconds", *(f"{each.seconds:.0f}" for each in outcomes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _run(command: Sequence[str | Path], log: Path) -> int:
    print(f"$ {' '.join(str(each) for each in command)}", flush=True)
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | quiet, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode


def _version(python: Path, package: str) -> str:
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tries the project with other versions of its libraries.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--folder", type=Path, help="where the environments go; default: a temporary folder")
    parser.add_argument("--torch", default=pinned_torch(), help="default: the one of constraints.txt")
    asked = parser.parse_args()
    if unknown := [name for name in asked.sets if name not in SETS]:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(SETS)}")
    folder = (asked.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    outcomes = [try_set(name, folder, project, asked.torch) for name in asked.sets or SETS]
    print(table(outcomes))
    failed = [each.name for each in outcomes if each.has_failed]
    for name in failed:
        log = folder / f"{name}.log"
        print(f"\n{name}: failed; the end of {log}:")
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
