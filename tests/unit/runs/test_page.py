"""The page is one file that asks for nothing, and text stays text."""

from __future__ import annotations

import re

from PIL import Image as PILImage

from mm_interleaved.runs.page import MAX_DOCUMENTS, panels, render_page


def text(words, **more):
    return {"type": "text", "text": words, **more}


def image(name="a.png", **more):
    return {"type": "image", "image": name, **more}


def page_of(*records):
    def picture(path):
        return PILImage.new("RGB", (2000, 1000) if path == "large.png" else (8, 8), (10, 200, 30))

    return render_page(records, picture, title="A <title>", made_by="by & by").decode()


def letters(parts):
    return [
        ("I" if panel.image else "") + "".join(words["text"] for words in panel.texts)
        for panel in panels(parts)
    ]


def test_pictures_go_with_the_text_before_them():
    assert letters([text("a"), image(), text("b"), text("c"), image(), text("d")]) == ["Ia", "Ibc", "d"]


def test_pictures_go_with_the_text_after_them_where_one_begins():
    assert letters([image(), text("a"), image(), image(), text("b")]) == ["Ia", "I", "Ib"]


def test_documents_without_pictures_are_one_page():
    assert letters([text("a"), text("b")]) == ["ab"]
    assert letters([]) == []


def test_page_asks_for_nothing():
    page = page_of(
        {"id": "a", "content": [text("see http://example.org/x.png"), image(), image("large.png")]}
    )
    sources = re.findall(r'(?:src|href|url|srcset|action)\s*[=(]\s*"?([^">)]{0,12})', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_text_is_escaped_everywhere():
    attack = '<script>alert(1)</script>"><img src=x onerror=1>'
    page = page_of(
        {"id": attack, "content": [text(attack, generated=True)]},
        {"id": "b", "meta": {"title": attack}, "messages": [{"role": attack, "content": [text(attack)]}]},
        {"id": "c", "error": {"code": "image", "field": None, "message": attack}},
    )
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert "A &lt;title&gt;" in page and "by &amp; by" in page


def test_generated_parts_are_marked_and_given_ones_are_not():
    star = 'class="star" title'
    assert star not in page_of({"id": "a", "content": [text("x"), image()]})
    page = page_of({"id": "a", "content": [text("x", generated=True), image(generated=True), text("y")]})
    assert page.count(star) == 2


def test_large_pictures_are_reduced():
    page = page_of({"id": "a", "content": [image("large.png")]})
    assert "data:image/jpeg" in page and len(page) < 60_000


def test_page_of_many_documents_is_bounded():
    page = page_of(*({"id": str(number), "content": [text("x")]} for number in range(MAX_DOCUMENTS + 5)))
    assert "5 more documents" in page
