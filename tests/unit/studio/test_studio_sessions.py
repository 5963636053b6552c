"""The studio around an engine without a model: lanes, sessions on disk, what is refused, what is exported."""

from __future__ import annotations

import asyncio
import io
import json
import re
import zipfile

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import ImageError, InputError, UsageError
from mm_interleaved.serving.settings import Limits
from mm_interleaved.studio import drawing
from mm_interleaved.studio.asks import lanes
from mm_interleaved.studio.exports import FORMS, as_markdown, export
from mm_interleaved.studio.settings_form import settings_form
from mm_interleaved.studio.shelf import Shelf
from mm_interleaved.studio.studio import Model, StaleError, Studio
from mm_interleaved.studio.view import session_view
from stub_serving import StubEngine
from tiny import tiny_processor


@pytest.fixture
def studio(tmp_path):
    model = Model("stub", tiny_processor(), {"num_inference_steps": 4}, (16, 16), 2000)
    return Studio(StubEngine(), model, tmp_path / "sessions", Limits())


def png(colour="red", size=(8, 8)):
    buffer = io.BytesIO()
    PILImage.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


async def act(studio, view, action, **fields):
    asked = {"revision": view["revision"], "action": action, "fields": fields}
    return await studio.act(view["session"], asked)


async def begun(studio, *words):
    view = studio.view(studio.shelf.new())
    parts = [{"type": "text", "text": word} for word in words]
    return await act(studio, view, "insert", index=0, parts=parts)


async def generated(studio, view, **ask):
    messages = [each async for each in studio.generate(view["session"], view["revision"], ask)]
    assert messages[-1]["type"] == "end" and messages[-1]["errors"] == [], messages[-1]
    return messages, messages[-1]["view"]


def shown(view):
    return [part.get("text", "I") for part in view["parts"]]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_a_document_is_continued_in_messages_and_saved(studio):
    async def story():
        view = await begun(studio, "Pip")
        messages, view = await generated(studio, view, kind="continue", settings={"layout": "T I"})
        types = [message["type"] for message in messages]
        assert types[0] == "start" and {"start text", "text", "start image", "preview", "image"} <= set(types)
        assert shown(view) == ["Pip", "0: Pip", "I"] and view["can_undo"] and not view["busy"]
        return view

    view = run(story())
    # Another process reads it.
    again = Shelf(studio.shelf.folder).open(view["session"])
    assert [part.generated for part in again.session.document.parts] == [False, True, True]
    assert again.losses == ()


def test_candidates_are_alternatives_of_one_place_and_one_step(studio):
    async def story():
        view = await begun(studio, "Pip")
        _, view = await generated(studio, view, kind="continue", settings={"layout": "I T"})
        _, more = await generated(studio, view, kind="again", part=1, candidates=3)
        assert more["parts"][1]["alternatives"]["count"] == 4 and shown(more)[2] == shown(view)[2]
        seeds = {node["settings"]["seed"] for node in more["parts"][1]["alternatives"]["nodes"]}
        assert len(seeds) == 4
        back = await act(studio, more, "undo")
        assert back["parts"][1]["node"] == view["parts"][1]["node"]

    run(story())


def test_a_job_that_nobody_listens_to_is_stopped_and_what_is_finished_is_kept(studio):
    async def story():
        view = await begun(studio, "slow Pip")
        events = studio.generate(view["session"], view["revision"], {"kind": "continue", "settings": LONG})
        async for message in events:
            if message["type"] == "image":
                break
        with pytest.raises(StaleError, match="the model is writing"):
            await act(studio, view, "undo")
        await events.aclose()
        for _ in range(200):
            if studio.shelf.open(view["session"]).job is None:
                break
            await asyncio.sleep(0.01)
        now = studio.view(studio.shelf.open(view["session"]))
        assert shown(now)[:3] == ["slow Pip", "0: slow Pip", "I"] and len(now["parts"]) < 8
        assert studio.engine.statistics().running == 0

    LONG = {"layout": "T I T I T I T I"}
    run(story())


def test_stop_keeps_what_is_written_and_a_part_that_was_to_be_kept(studio):
    async def story():
        view = await begun(studio, "slow Pip")
        before = None
        async for message in studio.generate(view["session"], view["revision"], {"kind": "continue"}):
            if message["type"] == "start image":
                studio.stop(view["session"])
            before = message
        assert before["reason"] == "stopped" and shown(before["view"]) == ["slow Pip", "0: slow Pip"]

    run(story())


def test_an_error_of_the_model_is_said_and_nothing_is_lost(studio):
    async def story():
        view = await begun(studio, "this raises")
        messages = [m async for m in studio.generate(view["session"], view["revision"], {"kind": "continue"})]
        [error] = messages[-1]["errors"]
        assert "/etc/stub" not in error and shown(messages[-1]["view"]) == ["this raises"]
        again = await act(studio, messages[-1]["view"], "edit", index=0, text="Pip")
        _, view = await generated(studio, again, kind="continue", settings={"layout": "T"})
        assert shown(view) == ["Pip", "0: Pip"]

    run(story())


def test_a_stale_page_and_wrong_asks_are_refused(studio):
    async def story():
        view = await begun(studio, "Pip")
        with pytest.raises(StaleError, match="another tab"):
            await act(studio, view | {"revision": view["revision"] - 1}, "undo")
        for ask, word in (
            ({"kind": "dream"}, "kind"),
            ({"kind": "again", "part": 5}, "expected 0 to 0"),
            ({"kind": "again", "part": "0"}, "whole number"),
            ({"kind": "again", "part": 0, "rest": "kept"}, "rest"),
            ({"kind": "continue", "candidates": 99}, "candidates"),
            ({"kind": "continue", "settings": {"num_inference_steps": 300}}, "num_inference_steps"),
            ({"kind": "continue", "settings": {"height": 4096, "width": 4096}}, "height"),
        ):
            with pytest.raises(UsageError, match=word):
                await anext(studio.generate(view["session"], view["revision"], ask))
        assert studio.shelf.open(view["session"]).job is None

    run(story())


def test_an_edit_with_regeneration_keeps_what_was_given_and_the_seed(studio):
    parts = [Text("a"), Text("b", generated=True), Text("given"), Text("c", generated=True)]
    session = Session.of(Document(id="s", parts=parts, generation={"seed": 5}))
    [lane] = lanes(session, {"kind": "follow", "part": 0}, {})
    assert (lane.part, lane.rest, lane.settings.seed, lane.settings.do_sample) == (1, "again", 5, True)
    [end] = lanes(session, {"kind": "follow", "part": 3}, {})
    assert end.part is None


def test_indices_of_pictures_that_come_later_are_left_out():
    picture = Image(PILImage.new("RGB", (8, 8)))
    parts = [picture, Image(png("green"), generated=True), picture]
    session = Session.of(Document(id="s", parts=parts, generation={"context_images": "0,2"}))
    [lane] = lanes(session, {"kind": "again", "part": 1}, {})
    assert lane.settings.context_images == "0"
    assert lane.document.generation["context_images"] == "0,2"


def test_pictures_are_looked_at_before_they_are_decoded(studio):
    kept = studio.upload(png())
    assert (kept["width"], kept["height"]) == (8, 8)
    bomb = io.BytesIO()
    PILImage.new("1", (13000, 13000)).save(bomb, format="PNG")
    for data in (bomb.getvalue(), b"<svg/>", png()[:50], b""):
        with pytest.raises(ImageError):
            studio.upload(data)


def test_a_damaged_session_opens_as_far_as_it_is_whole_and_is_put_aside(studio):
    async def story():
        view = await begun(studio, "one", "two", "three")
        file = studio.shelf.folder / view["session"] / "session.json"
        damaged = file.read_bytes().replace(b'"two"', b'"tw\xff')
        file.write_bytes(damaged)
        fresh = Studio(studio.engine, studio.model, studio.shelf.folder, Limits())
        seen = fresh.view(fresh.shelf.open(view["session"]))
        assert shown(seen) == ["one", "three"] and seen["losses"]
        await act(fresh, seen, "edit", index=0, text="One")
        assert (file.parent / "damaged-session.json").read_bytes() == damaged
        assert Session.load(file.parent).losses == ()

    run(story())


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a/b", "\0", ".hidden", "x" * 101, "none"])
def test_no_other_folder_is_a_session(tmp_path, name):
    (tmp_path / ".hidden").mkdir()
    shelf = Shelf(tmp_path / "sessions")
    with pytest.raises(InputError, match="no session"):
        shelf.open(name)


def test_a_link_to_another_folder_is_no_session(tmp_path):
    Document(id="s", parts=[Text("secret")]).save(tmp_path / "elsewhere")
    shelf = Shelf(tmp_path / "sessions")
    (shelf.folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no session"):
        shelf.open("link")
    assert shelf.list() == []


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in files.items():
            made.writestr(name, data)
    return buffer.getvalue()


def test_an_archive_is_taken_in_by_what_a_session_holds_and_nothing_else(tmp_path):
    shelf = Shelf(tmp_path / "sessions")
    record = json.dumps({"id": "s", "content": [{"type": "text", "text": "hello"}]})
    desk = shelf.take_in(archive(**{"a/session.json": record, "a/images/../../evil": "x", "../evil": "x"}))
    assert [part.text for part in desk.session.document.parts] == ["hello"]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"session.json"}
    for data, word in (
        (b"no archive", "no archive"),
        (archive(**{"other.json": "{}"}), "session.json"),
        (archive(**{"session.json": "{}"}), "whole"),
    ):
        with pytest.raises(InputError, match=word):
            shelf.take_in(data)
    assert len(shelf.list()) == 1


def test_hidden_branches_are_listed_with_where_they_leave():
    session = Session.of(Document(id="s", parts=[Text("a"), Text("b")]))
    session = session.showing(session.document.edited(1, "x"))
    view = session_view(session, lambda node, image: "")
    assert view["hidden"] == 1 and view["onwards"]["place"] is None and view["onwards"]["count"] == 0
    [branch] = view["branches"]
    assert branch["from"] == 1 and branch["begins"][0]["text"] == "b"


def test_the_drawer_begins_with_the_models_own_settings():
    groups = settings_form({"num_inference_steps": 12}, has_images=True)
    fields = {field["name"]: field for group in groups for field in group["fields"]}
    assert fields["num_inference_steps"]["own"] == 12 and fields["do_sample"]["kind"] == "switch"
    assert fields["scheduler"]["kind"] == "choice" and fields["negative_prompt"]["kind"] == "text"
    assert fields["temperature"]["whole"] is False and fields["seed"]["whole"] is True
    assert "Pictures" not in [group["group"] for group in settings_form({}, has_images=False)]


def test_every_form_of_export_is_a_file_of_its_kind():
    parts = [Text("Pip *finds* <b>a lamp</b>."), Image(png("red", (64, 64)))] * 5
    session = Session.of(Document(id="a b", parts=parts, meta={"title": "Élan & co"}))
    starts = {"markdown": b"PK", "session": b"PK", "html": b"<!doctype", "pdf": b"%PDF", "comic": b"\x89PNG"}
    for form in FORMS:
        made = export(session, form, "stub")
        assert made.data.startswith(starts[form]) and made.name.startswith("elan-co."), form
    assert int(re.search(rb"/Count (\d+)", export(session, "pdf", "stub").data)[1]) > 1
    with pytest.raises(UsageError, match="empty"):
        export(Session.of(Document(id="s")), "pdf", "stub")
    with pytest.raises(UsageError, match="markdown"):
        export(session, "markdwn", "stub")


def test_markdown_shows_a_text_as_it_is():
    from markdown_it import MarkdownIt

    for text in ("# no *heading* <script>", "1. one\n2. two", "![x](http://evil)", "a_b_c `d` [e](f) &amp;"):
        html = MarkdownIt("commonmark").render(as_markdown(text))
        assert set(re.findall(r"<(\w+)", html)) <= {"p", "br"}, html


def test_words_that_are_too_long_for_a_line_are_broken():
    face = drawing.font(20)
    lines = drawing.wrapped("short " + "x" * 200, 200, face)
    assert "".join(lines).replace(" ", "") == "short" + "x" * 200
    assert all(face.getlength(line) <= 200 for line in lines)
