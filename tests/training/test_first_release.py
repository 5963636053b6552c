"""Runs and logs of the first release, whose stages, losses and settings had other names, are still read."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.cli.main import run as run_command
from mm_interleaved.errors import StorageError, UsageError
from mm_interleaved.recipes.registry import RECIPES, Recipe
from mm_interleaved.recipes.run import run_recipe
from mm_interleaved.recipes.storyworld.former_names import present_line, stage_folder
from mm_interleaved.typed_settings import to_record
from saved_checkpoints import load_newest_checkpoint
from studies.__main__ import create_app
from studies.learning_curves import read_stages, write_curves
from studies.recipes import STUDY_RECIPES

SIZES = [
    "vae_channels=8,8,8", "vision_dim=16", "text_dim=24", "text_layers=2", "unet_channels=16,16,16,16",
    "conditioning_dim=16",
]  # fmt: skip
STAGES = ("vae", "vision", "text", "unet", "image")
TINY = [
    "num_threads=1", "batch_size=2", "vision_batch_size=2", "image_batch_size=2",
    *(f"sizes.{size}" for size in SIZES), *(f"{stage}.steps=2" for stage in STAGES),
]  # fmt: skip
FORMER_LOSSES = {"attributes": "naming", "attributes_badge": "naming_badge", "coreference": "mentions"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps a stage, under the present names."""
    run = tmp_path_factory.mktemp("runs") / "present"
    run_recipe("storyworld", TINY, out=run)
    return run


@pytest.fixture
def former(finished, tmp_path):
    """The same run as the first release would have left it, stopped before its last stage."""
    run = tmp_path / "former"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "image")
    (run / "unet").rename(run / "painter")
    record = json.loads((run / "settings.json").read_text())
    record["settings"]["painter"] = record["settings"].pop("unet")
    (run / "settings.json").write_text(json.dumps(record))
    for stage in ("painter", "text"):
        lines = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
        renamed = [{FORMER_LOSSES.get(name, name): value for name, value in line.items()} for line in lines]
        texts = [json.dumps(line | {"stage": stage}) + "\n" for line in renamed]
        (run / stage / "log.jsonl").write_text("".join(texts))
    return run


def test_a_run_of_the_first_release_goes_on_to_the_same_weights(finished, former, caplog):
    with caplog.at_level(logging.WARNING):
        run_recipe("storyworld", resume=True, out=former)
    assert "differ" not in caplog.text
    assert not (former / "unet").exists() and (former / "painter" / "step-00000002").exists()
    for stage, kept in (("unet", "painter"), ("image", "image")):
        now = load_newest_checkpoint(former / kept).tensors["weights"]
        expected = load_newest_checkpoint(finished / stage).tensors["weights"]
        assert now.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in now.items())
    assert "unet" in json.loads((former / "settings.json").read_text())["settings"]


def test_a_setting_may_be_given_by_its_former_name(tmp_path, caplog):
    taken = []

    def train(settings, folder, *, show_progress):
        taken.append(to_record(settings))
        raise StorageError("far enough")

    recipe = RECIPES["storyworld"]
    recipes = {"storyworld": Recipe(recipe.settings, train, former_names=recipe.former_names)}
    with pytest.raises(StorageError, match="far enough"):
        run_recipe("storyworld", ["painter.steps=7"], out=tmp_path / "run", recipes=recipes)
    assert taken[0]["unet"]["steps"] == 7
    assert "painter.steps: the setting is called unet.steps now" in caplog.text


def test_an_ablation_of_the_first_release_goes_on_with_its_settings(tmp_path, caplog):
    taken = []

    def train(settings, folder, *, show_progress):
        taken.append(settings)
        return folder

    recipe = STUDY_RECIPES["ablation"]
    names = {"former_names": recipe.former_names, "may_change": recipe.may_change}
    recipes = {"ablation": Recipe(recipe.settings, train, **names)}
    record = to_record(recipe.settings())
    record["twins"], record["painter"] = ["both-1"], record.pop("unet") | {"steps": 7}
    del record["variants"]
    (tmp_path / "painter-looking-1" / "step-00000001").mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps({"recipe": "ablation", "settings": record}))
    run_recipe("ablation", resume=True, out=tmp_path, recipes=recipes)
    assert taken[0].variants == ("both-1",) and taken[0].unet.steps == 7
    assert "settings differ" not in caplog.text
    run_recipe("ablation", ["twins=neither-1"], resume=True, out=tmp_path, recipes=recipes)
    assert taken[1].variants == ("neither-1",)
    with pytest.raises(UsageError, match=r"began with unet\.steps=7, found 8"):
        run_recipe("ablation", ["painter.steps=8"], resume=True, out=tmp_path, recipes=recipes)


def test_the_ablation_takes_its_variants_by_their_former_name(tmp_path, capsys):
    arguments = ["ablation", "-o", str(tmp_path / "run"), "--set", "twins=nobody"]
    assert run_command(arguments, create_app) == 2
    assert "variants: found 'nobody', expected some of both-1" in capsys.readouterr().err


def test_a_stage_is_where_its_run_began_it(tmp_path):
    assert stage_folder(tmp_path, "unet") == tmp_path / "unet"
    (tmp_path / "painter").mkdir()
    assert stage_folder(tmp_path, "unet") == tmp_path / "painter"
    assert stage_folder(tmp_path, "text") == tmp_path / "text"


def test_curves_of_a_former_log_have_the_present_names(former, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [line for stage in ("text", "painter") for line in read_stages(former / stage / "log.jsonl")]
    assert {line["stage"] for line in lines} == {"text", "unet"}
    assert {"attributes", "coreference", "attributes_badge"} <= lines[0].keys()
    page = write_curves(lines, {"unet": 2e9}, tmp_path / "docs", is_shipped=False).read_text()
    assert "| unet | unet | 2 | 2.00e+09 | 4.00e+09 |" in page
    assert min(PILImage.open(tmp_path / "docs" / "images" / "learning_curves.png").size) > 100
    assert present_line({"stage": "vae", "step": 1}) == {"stage": "vae", "step": 1}
