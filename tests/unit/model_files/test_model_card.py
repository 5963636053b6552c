"""A saved model says what it is, and gets onto the hub with that."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from mm_interleaved.model_files.model_card import TAGS, model_card, write_model_card
from mm_interleaved.model_files.resolve import shipped_folder
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class FakeHub:
    """Stands for the hub: keeps what it is sent."""

    def __init__(self):
        self.calls, self.files = [], {}

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return SimpleNamespace(repo_id=f"pip/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, **settings):
        self.calls.append(("upload_folder", repo_id, settings))
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "commit"


@pytest.mark.parametrize("paints", [True, False])
def test_a_card_is_what_the_hub_reads(paints, tmp_path):
    config = tiny_config(**({} if paints else {"unet_config": None, "vae_config": None})).to_dict()
    (tmp_path / "README.md").write_text(model_card(config, name="pip/lamp", license="mit", tags=["lamps"]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mm-interleaved" and card.data.license == "mit"
    assert card.data.pipeline_tag == ("any-to-any" if paints else "image-text-to-text")
    assert card.data.tags == [tag for tag in TAGS if paints or tag != "text-to-image"] + ["lamps"]
    assert 'load_generator("pip/lamp")' in card.text and "--model pip/lamp" in card.text
    assert "| context, tokens | 192 |" in card.text


def test_a_saved_model_has_a_card_which_is_never_overwritten(model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    assert ModelCard.load(tmp_path / "new" / "README.md").data.license == "unknown"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path / "rank 1", is_main_process=False)
    assert not (tmp_path / "rank 1" / "README.md").exists()


def test_the_license_is_the_one_given_else_that_of_the_model_it_came_from(tmp_path):
    config = tiny_config().to_dict()
    for name, given, source, license in (
        ("a", None, "", "unknown"),
        ("b", None, str(shipped_folder("storyworld")), "apache-2.0"),
        ("c", "mit", str(shipped_folder("storyworld")), "mit"),
        ("d", None, str(tmp_path), "unknown"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / "README.md").write_text("no header")
        write_model_card(tmp_path / name, config, license=given, source=source)
        assert ModelCard.load(tmp_path / name / "README.md").data.license == license


def test_the_shipped_model_has_a_card():
    data = ModelCard.load(shipped_folder("storyworld") / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("mm-interleaved", "any-to-any")
    assert data.license == "apache-2.0" and "storyworld" in data.tags


def test_model_and_processor_are_pushed_with_a_card(model):
    hub = FakeHub()
    made = model.push_to_hub("lamp", api=hub, private=True, commit_message="first", tags=["lamps"])
    assert made == "commit"
    assert hub.calls == [
        ("create_repo", "lamp", {"private": True, "token": None, "exist_ok": True}),
        ("upload_folder", "pip/lamp", {"commit_message": "first"}),
    ]
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} == set(hub.files)
    assert b"lamps" in hub.files["README.md"]
    tiny_processor(model.config).push_to_hub("pip/lamp", api=hub)
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(hub.files)


def test_saving_can_push_at_once(model, tmp_path):
    hub = FakeHub()
    model.save_pretrained(tmp_path / "lamp", push_to_hub=True, repo_id="pip/lamp", api=hub, token="t")
    assert ("upload_folder", "pip/lamp", {"token": "t"}) in hub.calls
    assert set(hub.files) == {path.name for path in (tmp_path / "lamp").iterdir()}
    again = MMInterleavedForConditionalGeneration.from_pretrained(tmp_path / "lamp")
    assert again.num_parameters() == model.num_parameters()
