"""Sessions: every alternative is kept, and what is on the disk is whole or says what it lost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.document_files import read_documents, write_documents
from mm_interleaved.documents.part_tree import PartTree
from mm_interleaved.documents.session import Session
from mm_interleaved.documents.session_files import SessionFolder
from mm_interleaved.errors import InputError, StorageError, UsageError


def picture(grey):
    return PILImage.new("RGB", (3, 2), (grey, grey, 0))


def story():
    parts = [
        Text("Pip finds <image> a lamp."),
        Image(picture(10)),
        Text("It glows.", generated=True, seed=1),
        Image(picture(20), generated=True, seed=2, pixel_error=0.5),
    ]
    return Document(
        id="s1",
        parts=parts,
        target=[Text("gold"), Image(picture(30))],
        layout="T I",
        generation={"seed": 4},
        meta={"title": "Pip"},
    )


def shown(tree):
    return "".join(part.text for part in tree.parts)


def letters(text):
    return [Text(letter) for letter in text]


def pixels(document):
    """A document as what can be compared, whatever its images lie in."""
    return [
        (part.text, part.role, part.generated, part.seed)
        if isinstance(part, Text)
        else (part.load().tobytes(), part.generated, part.seed, part.pixel_error)
        for part in (*document.parts, *document.target)
    ]


# ---- The tree --------------------------------------------------------------------------------------------


def test_paths_share_what_they_have_in_common():
    tree = PartTree().showing(letters("abc")).showing(letters("abX")).showing(letters("xbc"))
    assert shown(tree) == "xbc"
    assert len(tree.nodes) == 3 + 1 + 3
    assert [
        shown(PartTree().showing([tree.nodes[n].part for n in tree.path_to(tip)])) for tip in tree.tips
    ] == [
        "abc",
        "abX",
        "xbc",
    ]
    assert tree.showing(letters("abc")).nodes == tree.nodes


def test_stepping_goes_through_alternatives_and_comes_back_to_what_was_shown_behind():
    tree = PartTree().showing(letters("abc")).showing(letters("aXc")).showing(letters("aXd"))
    assert tree.alternatives(1) == ((1, 3), 1)
    assert shown(tree.stepped(1, -1)) == "abc"
    assert shown(tree.stepped(1, -1).stepped(1, 1)) == "aXd"
    assert tree.stepped(1, 1) is not None and shown(tree.stepped(1, 1)) == "aXd"
    assert shown(tree.stepped(0, 5)) == "aXd"


def test_a_part_that_was_deleted_at_the_end_is_hidden_and_found_again():
    tree = PartTree().showing(letters("abc")).showing(letters("ab"))
    assert shown(tree) == "ab" and tree.hidden == (2,)
    assert tree.alternatives(2) == ((2,), None)
    assert tree.below(1) == 1 and tree.below(0) == 2
    assert shown(tree.stepped(2, 1)) == "abc" == shown(tree.choosing(2))
    with pytest.raises(UsageError, match="expected 0 to 2"):
        tree.alternatives(3)
    with pytest.raises(UsageError, match="node: found 9"):
        tree.choosing(9)


@given(st.lists(st.text("ab", max_size=4), max_size=6), st.integers(0, 6))
def test_undo_and_redo_lead_back_and_forth_and_lose_nothing(texts, back):
    states = [PartTree()]
    for text in texts:
        states.append(states[-1].showing(letters(text)))
    seen = [shown(state) for state in states]
    steps = [text for place, text in enumerate(seen) if place == 0 or text != seen[place - 1]]
    tree = states[-1]
    for step in range(1, back + 1):
        tree = tree.undone()
        assert shown(tree) == steps[max(0, len(steps) - 1 - step)]
    for _ in range(back):
        tree = tree.redone()
    assert shown(tree) == steps[-1]
    assert tree.nodes == states[-1].nodes
    # A new path after going back forgets what was to come, and no node.
    other = states[-1].undone().showing(letters("c"))
    assert other.future == () and len(other.nodes) >= len(states[-1].nodes)


# ---- On disk ---------------------------------------------------------------------------------------------


def test_a_document_that_is_saved_and_loaded_is_the_same(tmp_path):
    file = story().save(tmp_path / "s")
    again = Document.load(tmp_path / "s")
    assert pixels(again) == pixels(story())
    assert (again.id, again.layout, again.generation, again.meta) == (
        "s1",
        "T I",
        {"seed": 4},
        {"title": "Pip"},
    )
    assert again.remarks == () and Document.load(file) == again
    # A second saving of the same writes the same.
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    again.save(tmp_path / "s")
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


def test_generate_reads_what_a_session_shows(tmp_path):
    file = story().save(tmp_path / "s")
    [read] = read_documents(file)
    assert pixels(read) == pixels(story()) and read.meta == {"title": "Pip"} and not read.remarks
    # Under another name it is a record like any other, and its history no part of it.
    other = file.rename(file.with_name("story.json"))
    [read] = read_documents(other)
    assert pixels(read) == pixels(story()) and read.meta == {"title": "Pip"} and not read.remarks
    write_documents(tmp_path / "s" / "all.jsonl", [read])
    assert "session" not in (tmp_path / "s" / "all.jsonl").read_text()


def test_saving_over_a_session_keeps_what_it_held(tmp_path):
    story().save(tmp_path)
    story().edited(0, "Pip finds a hat.").save(tmp_path)
    session = Session.load(tmp_path)
    assert session.document.parts[0] == Text("Pip finds a hat.")
    assert len(session.alternatives(0).nodes) == 2
    assert session.undone().document.parts[0] == story().parts[0]
    with pytest.raises(UsageError, match=r"holds the session of 's1', expected that of 'other'"):
        Document(id="other", parts=[Text("x")]).save(tmp_path)


def test_a_session_comes_back_with_its_history_and_settings(tmp_path):
    session = Session.of(story())
    session = session.showing(session.document.edited(2, "It is dark."), {"temperature": 0.5})
    session = session.showing(session.document.without(1)).undone()
    session.save(tmp_path)
    again = Session.load(tmp_path)
    assert again.losses == ()
    assert pixels(again.document) == pixels(session.document)
    assert [pixels(one) for one in again.documents] == [pixels(one) for one in session.documents]
    assert pixels(again.redone().document) == pixels(session.redone().document)
    assert [node.settings for node in again.tree.nodes] == [node.settings for node in session.tree.nodes]
    assert (again.tree.past, again.tree.future, again.tree.chosen) == (
        session.tree.past,
        session.tree.future,
        session.tree.chosen,
    )


def test_saving_often_writes_each_image_once(tmp_path, monkeypatch):
    folder, session = SessionFolder(tmp_path), Session.of(story())
    session.save(folder)
    encoded = []
    monkeypatch.setattr(Image, "encoded", lambda image: encoded.append(image))
    session.showing(session.document.edited(0, "other")).save(folder)
    assert encoded == [] and len(list((tmp_path / "images").iterdir())) == 3


def test_a_saving_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    session = Session.of(story())
    before = session.save(tmp_path).read_bytes()
    lost = session.showing(session.document.edited(1, Image(tmp_path / "nowhere.png")))
    with pytest.raises(InputError, match="no such file"):
        lost.save(tmp_path)
    assert (tmp_path / "session.json").read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        session.showing(session.document.edited(0, "other")).save(tmp_path)
    assert (tmp_path / "session.json").read_bytes() == before


# ---- Damage ----------------------------------------------------------------------------------------------


def saved(tmp_path):
    session = Session.of(story())
    session = session.showing(session.document.edited(0, "Pip finds a hat."))
    return session.save(tmp_path)


def test_an_image_that_is_gone_is_said_and_all_else_is_kept(tmp_path):
    file = saved(tmp_path)
    gone = json.loads(file.read_text())["content"][1]["image"]
    (tmp_path / gone).unlink()
    session = Session.load(file)
    assert [type(part).__name__ for part in session.document.parts] == ["Text", "Text", "Image"]
    assert session.document.text == "Pip finds a hat. It glows."
    assert len(session.losses) == 2 and all(
        "the image is lost" in loss and gone in loss for loss in session.losses
    )
    assert Document.load(file).remarks == session.losses
    assert session.stepped(0, -1).document.text == "Pip finds <image> a lamp. It glows."


def test_an_image_that_is_damaged_is_lost_and_one_that_was_changed_is_said(tmp_path):
    file = saved(tmp_path)
    first, second = (part["image"] for part in json.loads(file.read_text())["content"][1::2])
    data = (tmp_path / first).read_bytes()
    (tmp_path / first).write_bytes(data[: len(data) // 2])
    picture(99).save(tmp_path / second)
    session = Session.load(file)
    assert any("lost" in loss and first in loss for loss in session.losses)
    assert any("not as it was saved" in loss and second in loss for loss in session.losses)
    assert len(session.document.images) == 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.95])
def test_a_torn_file_opens_as_far_as_it_is_whole(tmp_path, share, caplog):
    file = saved(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    session = Session.load(file)
    assert "the file is damaged" in session.losses[0]
    assert session.document.id == "s1" and session.document.text.startswith("Pip finds")
    [read] = read_documents(file)
    assert pixels(read) == pixels(session.document)
    assert "the file is damaged" in caplog.text
    # Saving goes on, and what was damaged is put aside.
    session.document.save(tmp_path)
    assert Session.load(tmp_path).losses == ()
    assert (tmp_path / "damaged-session.json").read_bytes() == data[: int(len(data) * share)]


def test_every_single_damaged_line_loses_little_and_is_said(tmp_path):
    file = saved(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        file.write_bytes(b"".join([*lines[:number], b"\xff\x00garbage\n", *lines[number + 1 :]]))
        session = Session.load(file)
        assert session.losses
        assert len(session.tree.nodes) >= 7, number


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("", "no part that is whole"),
        ("[1, 2]", "no part that is whole"),
        (
            '{"id": "x", "session": {"format": "mm-interleaved session 9"}}',
            "expected 'mm-interleaved session 1'",
        ),
        ('{"id": "x", "content": []}', "no part that is whole"),
    ],
)
def test_what_is_no_session_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "session.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Document.load(tmp_path / "session.json")


def test_no_image_outside_the_folder_is_read(tmp_path):
    picture(1).save(tmp_path / "secret.png")
    file = saved(tmp_path / "s")
    record = json.loads(file.read_text())
    record["session"]["nodes"][1]["image"] = "../secret.png"
    file.write_text(json.dumps(record))
    assert any("outside the allowed folder" in loss for loss in Session.load(file).losses)


def test_fields_of_the_wrong_kind_are_left_out_and_said(tmp_path):
    file = saved(tmp_path)
    record = json.loads(file.read_text()) | {"layout": "XYZ", "generation": [1], "id": 7}
    record["session"] |= {"chosen": "x", "past": [99, "a"], "future": None}
    file.write_text(json.dumps(record))
    session = Session.load(file)
    assert session.document.layout is None and session.document.generation == {}
    assert len(session.losses) == 4 and session.document.parts


def test_half_of_a_surrogate_pair_costs_its_own_part_alone(tmp_path):
    """It is no UTF-8, so that no file can hold it but as an escape, which reading refuses."""
    session = Session.of(Document(id="s", parts=[Text("Pip"), Text("\ud800")]))
    session.save(tmp_path)
    found = Session.load(tmp_path)
    assert [part.text for part in found.document.parts] == ["Pip"] and "U+D800" in " ".join(found.losses)
