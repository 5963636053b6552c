"""The scaling study reads the run as it was trained, and its law is found again."""

import json

import pytest
from PIL import Image as PILImage

from mm_interleaved.cli.main import run as run_command
from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder
from mm_interleaved.typed_settings import to_record
from studies.__main__ import create_app
from studies.ablation.variants import LanguageVariant
from studies.scaling.page import envelope, fit_law, law_loss, write_scaling
from studies.scaling.recipe import ScalingConfig, size_folder

WIDTHS = (32, 96)
"""Not the defaults: a run keeps what it began with."""


def test_a_power_law_is_found_again():
    curve = [(compute, 3.0 * compute**-0.1) for compute in (1e12, 1e13, 1e14, 1e15)]
    worse = [(compute, loss * 1.5) for compute, loss in curve]
    best = envelope([curve, worse])
    law = fit_law(best)
    assert law == pytest.approx({"factor": 3.0, "exponent": 0.1})
    assert law_loss(law, 1e16) == pytest.approx(3.0 * 1e16**-0.1)
    assert fit_law(best[:2]) is None


@pytest.fixture
def trained(tmp_path):
    """A run of two sizes by hand, whose losses follow a law, on a seed of its own."""
    run = tmp_path / "run"
    for width in WIDTHS:
        folder = size_folder(run, width) / LanguageVariant(seed=5).name
        make_folder(folder)
        a_step = 1e9 * width
        made = [{"commit": "abc1234", "machine": "A chip", "date": "2026-11-23", "start": "first"}]
        cost = {"flops_a_step": a_step, "core_hours": 0.5, "threads": 2, "made_by": made}
        (folder / "cost.json").write_text(json.dumps(cost))
        lines = [
            {"stage": "text", "step": step, "text": 3.0 * (a_step * step) ** -0.1}
            for step in range(20, 801, 20)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = to_record(ScalingConfig(widths=WIDTHS, layers=(2, 2), seed=5))
    (run / "settings.json").write_text(json.dumps({"recipe": "scaling", "settings": settings}))
    return run


def test_the_sizes_of_the_run_are_drawn_and_its_law(trained, tmp_path):
    pytest.importorskip("matplotlib")
    results = write_scaling(trained, tmp_path / "docs")
    assert [size["width"] for size in results["sizes"]] == list(WIDTHS)
    assert results["law"]["exponent"] == pytest.approx(0.1, abs=0.005)
    assert results["expected_at_times"]["10"] == pytest.approx(3.0 * (96e9 * 8000) ** -0.1, rel=0.02)
    assert results["largest_compute"] == 96e9 * 800
    [first, *_] = results["sizes"][0]["curve"]
    assert first[0] == pytest.approx(32e9 * 100), "the mean of five lines stands at the last of them"
    written = json.loads((tmp_path / "docs" / "scaling_results.json").read_text())
    assert written["law"] == results["law"]
    assert (written["commits"], written["machines"], written["dates"]) == (
        ["abc1234"], ["A chip"], ["2026-11-23"]
    )  # fmt: skip
    assert (written["starts"], written["threads"]) == (["first"], [2])
    assert written["settings"]["widths"] == list(WIDTHS) and written["settings"]["seed"] == 5
    assert written["sizes"][0]["cost"]["reader"]["core_hours"] == 0.5
    assert min(PILImage.open(tmp_path / "docs" / "images" / "scaling.png").size) > 100


def test_a_run_of_which_nothing_is_trained_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        write_scaling(tmp_path, tmp_path / "docs")
    for cost in trained.rglob("cost.json"):
        cost.unlink()
    with pytest.raises(UsageError, match="no size has been trained yet"):
        write_scaling(trained, tmp_path / "docs")


def test_the_command_goes_on_with_the_sizes_of_the_run(trained, tmp_path, monkeypatch, capsys):
    """Called without `--set` it draws what the run was told to train, not the defaults."""
    pytest.importorskip("matplotlib")
    from mm_interleaved.recipes import run as training_run

    monkeypatch.setattr(training_run, "run_recipe", lambda name, overrides, **how: how["out"])
    assert run_command(["scaling", "-o", str(trained), "--docs", str(tmp_path / "docs")], create_app) == 0
    written = json.loads((tmp_path / "docs" / "scaling_results.json").read_text())
    assert [size["width"] for size in written["sizes"]] == list(WIDTHS)
    assert "* FLOPs ** -0.10" in capsys.readouterr().out
