"""Modules of 0.1 are still found, and say where they are now."""

import sys
from importlib import import_module

import pytest

from mm_interleaved.former_names import MOVED

TOP_OF_0_1 = (
    *("batch", "config", "conversation", "devices", "document", "document_formats", "errors"),
    *("generation_run", "image_references", "image_sources", "images", "known_words", "layout"),
    *("model_source", "placeholders", "processing", "prompts", "record_rules", "registration"),
    *("run_folder", "run_manifest", "run_results", "sequence", "spelling", "storage", "story_page"),
    *("strict_json", "versions", "visibility", "vocabulary"),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("former", TOP_OF_0_1)
def test_every_module_that_lay_at_the_top_is_found(former):
    assert import_module(f"mm_interleaved.{former}").__doc__


@pytest.mark.parametrize("former", sorted(MOVED))
def test_a_module_is_found_by_its_former_name_and_says_so(former, monkeypatch):
    monkeypatch.delitem(sys.modules, former, raising=False)
    with pytest.warns(DeprecationWarning, match=MOVED[former].replace(".", r"\.")):
        module = import_module(former)
    now = import_module(MOVED[former])
    names = [name for name in dir(now) if not name.startswith("__")]
    assert names and all(getattr(module, name) is getattr(now, name) for name in names)


def test_a_module_that_is_several_now_is_still_whole(monkeypatch):
    monkeypatch.delitem(sys.modules, "mm_interleaved.model_source", raising=False)
    with pytest.warns(DeprecationWarning):
        model_source = import_module("mm_interleaved.model_source")
    for name in (
        "find_model",
        "generation_defaults",
        "hash_model",
        "load_generator",
        "read_config",
        "SHIPPED",
    ):
        assert name in dir(model_source) and getattr(model_source, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = model_source.no_such_name


def test_a_class_of_both_names_is_one_class(monkeypatch):
    monkeypatch.delitem(sys.modules, "mm_interleaved.document", raising=False)
    with pytest.warns(DeprecationWarning):
        from mm_interleaved.document import Document
    from mm_interleaved import Document as Public

    assert Document is Public


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"mm_interleaved\.documentation"):
        import_module("mm_interleaved.documentation")
