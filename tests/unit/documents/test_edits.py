"""Edits of documents: pure functions, each part in its place."""

import doctest

import pytest
from PIL import Image as PILImage

import mm_interleaved.documents.document
import mm_interleaved.documents.part_tree
import mm_interleaved.documents.session
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import UsageError


def picture(grey=0):
    return Image(PILImage.new("RGB", (2, 2), (grey, grey, grey)))


def story(**fields):
    """Texts and images in turn; two images were given, the third part on is generated."""
    parts = [Text("a"), picture(1), Text("b", generated=True, seed=3), picture(2), Text("c"), picture(3)]
    return Document(id="s", parts=parts, **fields)


@pytest.mark.parametrize(
    "module",
    [
        mm_interleaved.documents.document,
        mm_interleaved.documents.part_tree,
        mm_interleaved.documents.session,
    ],
)
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_an_edit_changes_one_part_and_leaves_the_document_as_it_was():
    before = story(layout="T I", meta={"title": "A story"})
    after = before.edited(2, "other")
    assert after.parts[2] == Text("other")
    assert [after.parts[k] is before.parts[k] for k in range(6)] == [True, True, False, True, True, True]
    assert before == story(layout="T I", meta={"title": "A story"})
    assert (after.id, after.layout, after.meta) == (before.id, before.layout, before.meta)


def test_without_and_inserted_undo_each_other():
    before = story()
    for index, part in enumerate(before.parts):
        assert before.without(index).inserted(index, part) == before
    assert Document().inserted(0, "a", "b").text == "a b"
    assert before.inserted(6, "end").parts[-1] == Text("end")


def test_a_branch_holds_what_comes_before():
    before = story()
    assert before.branched(3).parts == before.parts[:3]
    assert before.branched(0).parts == () and before.branched(6) == before
    assert before.branched(2, id="s-2").id == "s-2"


def test_parts_take_the_role_of_their_place():
    talk = Document(parts=[Text("hi", role="user"), Text("hello", role="assistant")])
    assert talk.edited(1, "bye").parts[1].role == "assistant"
    assert talk.edited(1, Text("bye", role="system")).parts[1].role == "system"
    assert talk.inserted(1, picture()).parts[1].role == "user"
    assert talk.inserted(0, "first").parts[0].role == "user"
    assert talk.inserted(2, "more").parts[2].role == "assistant"


@pytest.mark.parametrize(
    ("change", "context"),
    [
        (lambda document: document.without(1), "1,2"),
        (lambda document: document.without(0), "0,2,3"),
        (lambda document: document.inserted(0, picture()), "1,3,4"),
        (lambda document: document.inserted(4, picture()), "0,3,4"),
        (lambda document: document.edited(1, "no image any more"), "1,2"),
        (lambda document: document.edited(1, picture(9)), "0,2,3"),
        (lambda document: document.edited(0, picture(9)), "1,3,4"),
    ],
)
def test_indices_of_earlier_images_follow_their_images(change, context):
    """0 and 2 are images of the story, 3 is one that is still to come."""
    changed = change(story(generation={"context_images": [0, 2, 3], "seed": 5}))
    assert changed.generation == {"context_images": context, "seed": 5}


def test_a_choice_of_images_that_are_all_gone_goes_with_them():
    chosen = story(generation={"context_images": "1"})
    assert chosen.without(3).generation == {}
    assert story(generation={"context_images": "previous"}).without(3).generation == {
        "context_images": "previous"
    }


def test_a_slip_is_refused_with_what_is_expected():
    for index in (6, -1, True, "1", None):
        with pytest.raises(UsageError, match=r"part: found .*, expected 0 to 5") as refused:
            story().without(index)
        assert refused.value.field == "part"
    with pytest.raises(UsageError, match="expected 0 to 6"):
        story().inserted(7, "x")
    with pytest.raises(UsageError, match="expected none, it is empty"):
        Document().edited(0, "x")
    with pytest.raises(TypeError, match=r"part\[0\]: expected Text or Image, found int"):
        story().edited(0, 3)
