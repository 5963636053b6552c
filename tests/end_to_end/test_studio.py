"""`studio` in a real browser: a tiny model behind the page, headless Chromium before it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image as PILImage
from playwright.sync_api import expect

from mm_interleaved import Document, Session
from mm_interleaved.documents.document_files import read_documents

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install chromium")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> <|image|> **bold** [link](http://evil.example)"


class Studio:
    """The command, as it is typed."""

    def __init__(self, model: Path, sessions: Path, port: int = 0):
        self.arguments = ("--model", str(model), "--sessions", str(sessions))
        self.sessions = sessions
        command = [sys.executable, "-m", "mm_interleaved", "studio", *self.arguments, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", first)
        assert found, (first, self.process.stderr.read())
        self.url, self.port = found[0], int(found[1])

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def studio(tiny_folder, tmp_path_factory):
    running = Studio(tiny_folder, tmp_path_factory.mktemp("studio") / "sessions")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    context.set_default_timeout(20_000)
    yield context
    context.close()


def opened(context, address):
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if "evil" in request.url else None)
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


def name_of(page):
    return re.search(r"session=([^&]+)", page.url)[1]


def saved(studio, page):
    return Session.load(studio.sessions / name_of(page))


def continued(page, layout, words=""):
    page.fill("#words", words)
    choose_layout(page, layout)
    page.click("#continue")
    finished(page)


def choose_layout(page, layout):
    page.click("#layouts [data-layout='']")
    page.fill("#layout", layout)


def finished(page):
    page.wait_for_selector("#continue:visible")


def part(page, place):
    return page.locator(f".part[data-place='{place}']")


def kinds(page):
    return [
        "I" if "image" in each.get_attribute("class").split() else "T" for each in page.locator(".part").all()
    ]


def seen(document):
    """What its parts hold, wherever the files of images lie."""
    return [getattr(each, "text", None) or each.load().tobytes() for each in document.parts]


def png(colour):
    buffer = io.BytesIO()
    PILImage.new("RGB", (24, 24), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def upload(colour):
    return {"name": "../../x.png", "mimeType": "image/png", "buffer": png(colour)}


def test_a_story_is_written_with_mistakes_and_saved_as_it_grows(studio, context):
    page = opened(context, studio.url)
    # Words, a picture between them, more words: in the order in which they are placed.
    page.fill("#words", "Pip finds a lamp.")
    page.set_input_files("#file", [])
    with page.expect_file_chooser() as chooser:
        page.click("#add-picture")
    chooser.value.set_files(upload("red"))
    part(page, 1).wait_for()
    assert kinds(page) == ["T", "I"] and page.input_value("#words") == ""
    continued(page, "T I", "It glows.")
    assert kinds(page) == ["T", "I", "T", "T", "I"]
    assert [each.generated for each in saved(studio, page).document.parts] == [False] * 3 + [True] * 2

    # A picture again: the one before is kept, and stepped through.
    first = part(page, 4).locator("img").get_attribute("src")
    part(page, 4).focus()
    page.keyboard.press("r")
    page.get_by_label("Alternative 2 of 2: all side by side").wait_for()
    finished(page)
    assert part(page, 4).locator("img").get_attribute("src") != first
    page.keyboard.press("ArrowLeft")
    page.get_by_label("Alternative 1 of 2: all side by side").wait_for()
    assert part(page, 4).locator("img").get_attribute("src") == first

    # An edit that is only saved changes nothing else; undo takes it back; redo brings it again.
    part(page, 0).focus()
    page.keyboard.press("e")
    page.get_by_label("Text of part 1").fill(HOSTILE)
    page.keyboard.press("Control+s")
    expect(page.locator(".part p").first).to_contain_text(re.compile("^<img"))
    assert kinds(page) == ["T", "I", "T", "T", "I"]
    page.keyboard.press("Control+z")
    expect(page.locator(".part p").first).to_contain_text(re.compile("^Pip"))
    page.click("#redo")
    expect(page.locator(".part p").first).to_contain_text(re.compile("^<img"))

    # An edit with regeneration: what was generated behind it is made again, what was given stays.
    before = saved(studio, page).document.parts
    part(page, 0).focus()
    page.keyboard.press("Enter")
    page.get_by_label("Text of part 1").fill("Pip finds a hat.")
    page.get_by_role("button", name="Save and regenerate").click()
    finished(page)
    after = saved(studio, page).document.parts
    assert after[0].text == "Pip finds a hat." and after[1:3] == before[1:3]
    assert [each.generated for each in after] == [False] * 3 + [True] * 2 and after[4] != before[4]

    # Delete, move, branch: hidden, not lost.
    part(page, 1).focus()
    page.keyboard.press("Alt+ArrowUp")
    expect(page.locator(".part").first).to_have_class(re.compile("image"))
    part(page, 2).focus()
    page.keyboard.press("Delete")
    expect(page.locator(".part")).to_have_count(4)
    part(page, 2).focus()
    page.keyboard.press("b")
    expect(page.locator(".part")).to_have_count(2)
    assert "It went on from here" in page.inner_text("#onwards")
    page.click("#branches")
    hidden = page.locator("#dialog-body .choice")
    count = hidden.count()
    assert count >= 4
    hidden.first.click()
    expect(page.locator(".part")).to_have_count(4)
    assert page.complaints == [] and page.title() == "Studio"

    # All of it is a session that Python and `generate` read.
    session = saved(studio, page)
    texts = [node.part.text for node in session.tree.nodes if hasattr(node.part, "text")]
    assert {"Pip finds a lamp.", HOSTILE, "Pip finds a hat."} <= set(texts)
    [document] = read_documents(studio.sessions / name_of(page) / "session.json")
    assert document.parts == session.document.parts


def test_candidates_stand_side_by_side_and_the_chosen_pictures_feed_them(studio, context):
    page = opened(context, studio.url)
    continued(page, "I T I", "Two pictures.")
    part(page, 3).focus()
    page.keyboard.press("Shift+R")
    page.select_option("#again-count", "3")
    page.get_by_label("Picture 1 feeds it").click()
    page.get_by_role("button", name="Regenerate", exact=True).click()
    page.wait_for_selector("#dialog .choices .choice >> nth=3")
    choices = page.locator("#dialog .choice")
    assert choices.count() == 4
    choices.nth(2).click()
    page.get_by_label("Alternative 3 of 4: all side by side").wait_for()
    session = saved(studio, page)
    nodes = [session.tree.nodes[node] for node in session.alternatives(3).nodes]
    assert len({node.part.seed for node in nodes}) == 4
    assert [node.settings.get("context_images") for node in nodes] == [None, "0", "0", "0"]
    # One undo, one step: the choice; another: all candidates.
    page.click("#undo")
    page.click("#undo")
    page.get_by_label("Alternative 1 of 4: all side by side").wait_for()


def test_what_the_model_looked_at_is_shown_where_one_points(studio, context):
    page = opened(context, studio.url)
    assert page.locator("#looked").is_hidden()
    continued(page, "I T I", "Two pictures.")
    with page.expect_popup() as popup:
        page.click("#looked")
    shown = popup.value
    expect(shown.locator(".seen figure")).to_have_count(2)
    shown.locator("[data-token]").last.hover()
    # Its script runs in the sandbox, and has read the samples.
    expect(shown.locator("#what")).to_contain_text(re.compile(r"image 1: \d+ %"))


def test_two_tabs_never_mix_and_a_stale_one_is_told(studio, context):
    first, second = opened(context, studio.url), opened(context, studio.url)
    assert name_of(first) != name_of(second)
    for page, word in ((first, "nonce-one"), (second, "nonce-two")):
        page.fill("#words", word)
        choose_layout(page, "T I")
    first.click("#continue")
    second.click("#continue")
    finished(first)
    finished(second)
    assert saved(studio, first).document.parts[0].text == "nonce-one"
    assert saved(studio, second).document.parts[0].text == "nonce-two"
    third = opened(context, first.url)
    third.fill("#words", "from the third tab")
    third.click("#add-text")
    part(third, 3).wait_for()
    first.fill("#words", "from the first tab")
    first.click("#add-text")
    first.wait_for_selector(".notice")
    assert "another tab has changed" in first.inner_text("#notices")
    # It shows what the other did, its own words are kept, and the next try works.
    assert part(first, 3).inner_text().strip().startswith("from the third tab")
    assert first.input_value("#words") == "from the first tab"
    first.click("#add-text")
    part(first, 4).wait_for()


def test_exports_are_whole_files(studio, context, tmp_path):
    page = opened(context, studio.url)
    page.fill("#title", "A story & more")
    page.keyboard.press("Enter")
    continued(page, "I T I", f"Begin. {HOSTILE}")
    files = {}
    for form in ("markdown", "html", "pdf", "comic", "session"):
        page.click("#export")
        with page.expect_download() as download:
            page.click(f"[data-form={form}]")
        files[form] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[form])
        page.keyboard.press("Escape")
    assert files["pdf"].read_bytes().startswith(b"%PDF") and files["pdf"].name == "a-story-more.pdf"
    assert np.asarray(PILImage.open(files["comic"])).std() > 10
    html = files["html"].read_text("utf-8")
    assert "<img src=x" not in html and html.count("data:image/png") == 2 and "http-equiv" in html
    with zipfile.ZipFile(files["markdown"]) as archive:
        assert {"story.md", "images/001.png", "images/002.png"} == set(archive.namelist())
    with zipfile.ZipFile(files["session"]) as archive:
        archive.extractall(tmp_path / "again")
    assert seen(Document.load(tmp_path / "again")) == seen(saved(studio, page).document)
    # It comes back as a session of its own.
    page.click("#sessions")
    with page.expect_navigation():
        page.set_input_files("#dialog-body input[type=file]", files["session"])
    page.wait_for_selector("html[data-ready]")
    assert kinds(page) == ["T", "I", "T", "I"] and page.input_value("#title") == "A story & more"


def test_it_works_at_390_pixels_in_the_dark_and_is_labelled(studio, browser):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    page = opened(context, studio.url)
    continued(page, "T I", "Pip finds a lamp, a hat and a very long wordwordwordwordwordwordwordwordword.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.querySelector('.paper')).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, img')]
           .filter(e => !e.hidden && !(e.ariaLabel || e.textContent.trim() || e.alt || e.labels?.length))
           .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert part(page, 1).get_attribute("aria-label") == "Part 2 of 3, text, made by the model"
    for name in ("#settings", "#sessions", "#export", "#keys", "#branches"):
        page.click(name)
        page.wait_for_selector("#dialog[open]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.keyboard.press("Escape")
    assert page.complaints == []
    context.close()


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio/gradio_api/file=/etc/passwd",
        "gradio/gradio_api/file=%2Fetc%2Fpasswd",
        "gradio/gradio_api/file=http://127.0.0.1:1/",
        "gradio/gradio_api/proxy=http://127.0.0.1:1/",
        "gradio/gradio_api/info",
        "gradio/config",
        "gradio/",
        "gradio/gradio_api/file=../../../../etc/passwd",
        "gradio/%67radio_api/file=pyproject.toml",
        "page/..%2f__init__.py",
        "pictures/..%2f..%2fetc/0.png",
        "sessions/..%2f..",
        "sessions/%2Fetc",
    ],
)
def test_no_file_is_served_that_is_not_the_studios(studio, path):
    # As it is typed: clients tidy addresses up.
    answer = httpx2.get(f"{studio.url}{path}")
    assert answer.status_code in (400, 404) and "root:" not in answer.text, answer.text


def test_what_a_server_refuses_is_refused(studio):
    with httpx2.Client(base_url=studio.url, headers={"X-Studio": "1"}, timeout=30) as client:
        bomb = io.BytesIO()
        PILImage.new("1", (13000, 13000)).save(bomb, format="PNG")
        refused = [
            client.post("pictures", content=bomb.getvalue()),
            client.post("pictures", content=b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
            client.post("pictures", content=png("red")[:60]),
            client.post("import", content=b"PK no archive"),
        ]
        assert [each.status_code for each in refused] == [400] * 4
        assert client.post("pictures", content=b"x" * (33 * 2**20)).status_code == 413
        assert httpx2.post(f"{studio.url}sessions").status_code == 403  # another page's request
        assert client.get("sessions", headers={"Host": "evil.example"}).status_code == 403
        view = client.post("sessions").json()

        def act(action, **fields):
            asked = {"revision": view["revision"], "action": action, "fields": fields}
            return client.post(f"sessions/{view['session']}", content=json.dumps(asked))

        for answer in (
            act("dlete", index=0),
            act("delete", index=0),
            act("settings", changes={"num_inference_steps": -1}),
            act("settings", changes={"seeed": 1}),
            act("insert", index=0, parts=[{"type": "image", "upload": "/etc/passwd"}]),
            act("insert", index=0, parts=[{"type": "image", "path": "/etc/passwd"}]),
            act("insert", index=0, parts=[{"type": "text", "text": "x" * 200_001}]),
        ):
            assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
        for ask in ({"kind": "continue", "settings": {"num_inference_steps": 999}}, {"kind": "no"}, {}):
            asked = {"data": [view["session"], view["revision"], ask]}
            event = client.post("gradio/gradio_api/call/generate", json=asked).json()["event_id"]
            text = client.get(f"gradio/gradio_api/call/generate/{event}").text
            assert '"refused"' in text, text
    left = [path.name for path in studio.sessions.rglob("*") if path.name.startswith((".tmp", "x.png"))]
    assert left == []


def test_a_killed_studio_comes_back_with_what_was_written(studio, tiny_folder, context):
    first = studio
    page = opened(context, first.url)
    continued(page, "T I", "Before the crash.")
    page.fill("#words", "a draft that was never added")
    shown = saved(first, page).document.parts
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    page.click("#undo")
    page.wait_for_selector("[data-id=lost]")
    second = Studio(tiny_folder, first.sessions, first.port)
    page.wait_for_selector("[data-id=lost]", state="detached")
    assert kinds(page) == ["T", "T", "I"] and saved(second, page).document.parts == shown
    assert page.input_value("#words") == "a draft that was never added"
    # Another studio on the same folder is refused, this one ends quietly.
    command = [sys.executable, "-m", "mm_interleaved", "studio", *first.arguments, "--port", "0"]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert refused.returncode == 2 and "in use by process" in refused.stderr
    assert second.stop() == 0
