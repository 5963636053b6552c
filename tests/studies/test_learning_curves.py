"""Learning curves show what the log holds, and refuse in one sentence what is no log."""

import json

import pytest
from PIL import Image as PILImage

from mm_interleaved.cli.main import run
from mm_interleaved.errors import InputError
from studies.__main__ import create_app
from studies.learning_curves import (
    costs_of,
    curves_text,
    losses_of,
    plot_curves,
    read_stages,
    run_starts,
    write_curves,
)

LINES = [
    {"stage": "vae", "step": 10, "pixel": 0.5, "lr": 0.1, "images/s": 30.0},
    {"stage": "vae", "step": 20, "pixel": 0.25, "kl": 0.0},
    {"stage": "text", "run": "first", "step": 50, "seconds": 1800, "text": 2.0},
    {"stage": "text", "run": "first", "step": 100, "seconds": 3600, "text": 1.0},
    {"stage": "text", "run": "second", "step": 40, "text": 0.5},
]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"stage": "te')
    return path


def test_each_run_counts_its_last_line():
    vae, first, second = costs_of(LINES, {"text": 2e9})
    assert (vae.stage, vae.run, vae.steps, vae.flops, vae.hours) == ("vae", "vae", 20, None, None)
    assert (first.run, first.steps, first.flops, first.hours) == ("first", 100, 2e11, 1.0)
    assert (second.run, second.steps, second.flops, second.hours) == ("second", 40, 8e10, None)


def test_the_page_adds_up_runs_and_says_what_is_not_known():
    page = curves_text(costs_of(LINES, {"text": 2e9}), is_shipped=False)
    for row in (
        "| vae | vae | 20 |  |  |  |",
        "| text | first | 100 | 2.00e+09 | 2.00e+11 | 1.00 |",
        "| text | second | 40 | 2.00e+09 | 8.00e+10 |  |",
        "| text | all of the stage | 140 | 2.00e+09 | 2.80e+11 | at least 1.00 |",
        "|  | all stages | 160 |  | at least 2.80e+11 | at least 1.00 |",
    ):
        assert row in page.splitlines(), row
    assert "Hardware" not in page
    assert "two cores of a shared CPU" in curves_text(costs_of(LINES, {}), is_shipped=True)


def test_runs_of_a_stage_follow_each_other_and_rates_are_no_losses():
    text = LINES[2:]
    assert run_starts(text) == {"first": 0, "second": 100}
    assert losses_of(text) == {"text": {"first": [(50, 2.0), (100, 1.0)], "second": [(140, 0.5)]}}
    assert losses_of(LINES[:2]) == {"pixel": {None: [(10, 0.5), (20, 0.25)]}}


def test_page_and_plot_are_written(log, tmp_path):
    pytest.importorskip("matplotlib")
    lines = read_stages(log)
    assert lines == LINES, "the torn line is left out"
    docs = tmp_path / "new" / "docs"
    path = write_curves(lines, {}, docs, is_shipped=False)
    assert "| text | second | 40 |" in path.read_text()
    plot = docs / "images" / "learning_curves.png"
    assert min(PILImage.open(plot).size) > 100
    before = plot.read_bytes()
    plot_curves([*LINES[:-1], {**LINES[-1], "text": 0.1}], plot)
    assert plot.read_bytes() != before


def test_the_page_of_the_shipped_model_has_what_the_studies_took(tmp_path):
    pytest.importorskip("matplotlib")

    def cost(flops):
        return {"flops": flops, "core_hours": 0.5, "wall_hours": 0.75}

    shared = {"painter": cost(1e12)}
    members = [{"cost": {"reader": cost(2e12), **shared}}, {"cost": {"reader": cost(4e12), **shared}}]
    (tmp_path / "ablation_results.json").write_text(json.dumps({"twins": members, "machines": ["A chip"]}))
    page = write_curves(LINES, {}, tmp_path, is_shipped=True).read_text()
    [row] = [line for line in page.splitlines() if "`python -m studies ablation`" in line]
    assert row.endswith("| 3 | 7.00e+12 | 1.50 | 2.25 | A chip |"), "what both share counts once"
    assert "python -m studies scaling" not in page
    assert "What the studies took" not in write_curves(LINES, {}, tmp_path, is_shipped=False).read_text()


def test_a_stage_of_many_losses_still_fits_its_panel(tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    losses = {f"loss{number}": 1.0 + number for number in range(16)}
    lines = [
        {"stage": "vision", "run": name, "step": step, **losses} for name in "abcde" for step in (10, 20)
    ]
    plot_curves(lines, tmp_path / "plot.png")
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]


def test_the_shipped_log_is_read():
    assert {line["stage"] for line in read_stages(None)} >= {"vae", "vision", "text", "unet"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "found no lines, expected those of a training log"),
        ('{"stage": "vae", "step": 1}\n{"step": 2}\n', ":2: stage: found None, expected the stage"),
        ('{"stage": "vae", "step": "many"}\n', ":1: step: found 'many', expected the step"),
        ("[1]\n", ":1: stage: found None"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(tmp_path, capsys, text, found):
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError):
        read_stages(path)
    assert run(["curves", str(path), "--no-cost", "--docs", str(tmp_path / "docs")], create_app) == 3
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and str(path) in error and found in error
    assert not (tmp_path / "docs").exists()
