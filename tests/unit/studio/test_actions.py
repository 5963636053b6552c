"""What a person does to a document, without model and without page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import UsageError
from mm_interleaved.studio.actions import ACTIONS, apply, as_one_step, new_session, title_of


def picture(value):
    return Image(PILImage.new("RGB", (8, 8), (value, 0, 0)))


def session(*texts):
    return Session.of(Document(id="s", parts=[Text(text) for text in texts]))


def texts(found):
    return [part.text if isinstance(part, Text) else "I" for part in found.document.parts]


def test_each_action_does_what_its_name_says_and_undo_takes_it_back():
    begun = session("a", "b", "c")
    done = {
        "insert": ({"index": 1, "parts": [Text("x"), picture(3)]}, ["a", "x", "I", "b", "c"]),
        "edit": ({"index": 1, "text": "x"}, ["a", "x", "c"]),
        "replace": ({"index": 1, "image": picture(4)}, ["a", "I", "c"]),
        "delete": ({"index": 0}, ["b", "c"]),
        "move": ({"index": 2, "to": 0}, ["c", "a", "b"]),
        "branch": ({"index": 1}, ["a"]),
    }
    for name, (fields, expected) in done.items():
        after = apply(begun, name, fields)
        assert texts(after) == expected, name
        assert texts(apply(after, "undo", {})) == ["a", "b", "c"], name
        assert texts(apply(apply(after, "undo", {}), "redo", {})) == expected, name


def test_alternatives_are_stepped_through_and_hidden_branches_are_shown_again():
    edited = apply(session("a", "b"), "edit", {"index": 0, "text": "x"})
    back = apply(edited, "step", {"index": 0, "by": -1})
    assert texts(edited) == ["x", "b"] and texts(back) == ["a", "b"]
    assert texts(apply(back, "choose", {"node": edited.tree.path[-1]})) == ["x", "b"]


def test_the_same_text_again_is_no_edit():
    begun = Session.of(Document(id="s", parts=[Text("made", generated=True, seed=3)]))
    assert apply(begun, "edit", {"index": 0, "text": "made"}) is begun


def test_settings_title_and_layout_belong_to_the_document():
    found = apply(session("a"), "settings", {"changes": {"seed": 3, "temperature": 0.5}})
    found = apply(found, "settings", {"changes": {"temperature": None}})
    found = apply(apply(found, "layout", {"layout": "ti"}), "rename", {"title": " A  story "})
    document = found.document
    assert (document.generation, document.layout, title_of(found)) == ({"seed": 3}, "T I", "A story")
    assert "meta" not in apply(found, "rename", {"title": ""}).head


def test_chosen_pictures_follow_their_pictures_when_parts_move():
    begun = Session.of(Document(id="s", parts=[picture(0), picture(1), Text("t")]))
    chosen = apply(begun, "settings", {"changes": {"context_images": "0"}})
    moved = apply(chosen, "move", {"index": 0, "to": 2})
    assert moved.document.generation["context_images"] == "1"


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("edti", {}, "edit"),
        ("edit", {"index": 0}, "text"),
        ("edit", {"index": True, "text": "x"}, "whole number"),
        ("edit", {"index": 9, "text": "x"}, "expected 0 to 1"),
        ("move", {"index": 0, "to": 5}, "expected 0 to 1"),
        ("insert", {"index": 0, "parts": []}, "parts"),
        ("insert", {"index": 0, "parts": ["text"]}, "parts"),
        ("replace", {"index": 0, "image": "/etc/passwd"}, "image"),
        ("choose", {"node": 7}, "expected 0 to"),
        ("settings", {"changes": {"seeed": 1}}, "seed"),
        ("settings", {"changes": {"top_p": 3}}, "top_p"),
        ("settings", {"changes": [1]}, "changes"),
        ("layout", {"layout": "T X"}, "layout"),
        ("rename", {"title": "x" * 201}, "200"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(name, fields, word):
    with pytest.raises(UsageError, match=word):
        apply(session("a", "b"), name, fields)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 3), st.integers(0, 3)), max_size=12)
)
def test_nothing_that_was_ever_shown_is_lost(steps):
    found, seen = session("a", "b"), {"a", "b"}
    for number, (name, index, other) in enumerate(steps):
        fields = {"index": index, "to": other, "by": other - 1, "node": other, "text": f"text {number}"}
        fields |= {"parts": [Text(f"new {number}")], "changes": {"seed": other}, "layout": "T", "title": "x"}
        try:
            found = apply(found, name, fields)
        except UsageError:
            continue
        seen.update(part.text for part in found.document.parts)
        assert {node.part.text for node in found.tree.nodes} >= seen


def test_many_changes_become_one_step():
    begun = session("a", "b")
    after = begun
    for text in "xyz":
        after = after.showing(begun.document.edited(1, text))
    one = as_one_step(begun, after)
    assert texts(one) == ["a", "z"] and texts(one.undone()) == ["a", "b"]
    assert as_one_step(begun, begun).tree == begun.tree


def test_an_empty_session_takes_its_first_part():
    first = apply(new_session("n"), "insert", {"index": 0, "parts": [Text("a")]})
    assert texts(first) == ["a"] and texts(first.undone()) == []
