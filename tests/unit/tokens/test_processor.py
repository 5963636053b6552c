"""A processor comes back from a folder and from the hub's cache, by the model's id."""

from __future__ import annotations

import pytest

from mm_interleaved.errors import ModelFileError
from mm_interleaved.tokens.processor import MMInterleavedProcessor

OFFLINE = {"local_files_only": True}


@pytest.fixture
def hub_cache(byte_level_tokenizer, tmp_path):
    """A cache of the hub that holds one model, as a download would have left it."""
    model, commit = tmp_path / "models--pip--lamp", "0" * 40
    MMInterleavedProcessor(byte_level_tokenizer, 32, 48, 3).save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return tmp_path


def test_a_hub_id_gives_the_processor_of_its_files(hub_cache):
    processor = MMInterleavedProcessor.from_pretrained("pip/lamp", cache_dir=hub_cache, **OFFLINE)
    [snapshot] = (hub_cache / "models--pip--lamp" / "snapshots").iterdir()
    assert processor.to_dict() == MMInterleavedProcessor.from_pretrained(snapshot).to_dict()
    assert processor.target_pixels.size == 48


def test_what_is_neither_folder_nor_on_the_hub_is_named(tmp_path):
    with pytest.raises(
        ModelFileError,
        match=r"model 'pip/lamp': no such folder, not in the hub cache .*, and only local files are allowed",
    ):
        MMInterleavedProcessor.from_pretrained("pip/lamp", cache_dir=tmp_path, **OFFLINE)
