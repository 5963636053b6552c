"""Records in, one page out: an illustrated story that needs nothing but itself.

Images are inlined, nothing is loaded from anywhere, there is no script; all text is escaped. What the model
made is marked with a small star.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from PIL import Image as PILImage

MAX_DOCUMENTS = 200
"""A page of more documents than this would be too heavy to open; the rest stands in the results."""
_MAX_SIDE = 1200
_CRISP_SIDE = 128
_STAR = '<span class="star" title="made by the model">✦</span>'

OpenImage = Callable[[str], PILImage.Image]


@dataclass(slots=True)
class Panel:
    """One page of the book: at most one image, and the texts that belong to it."""

    image: Mapping[str, Any] | None = None
    texts: list[Mapping[str, Any]] = field(default_factory=list)


def render_page(
    records: Sequence[Mapping[str, Any]],
    open_image: OpenImage,
    *,
    title: str,
    made_by: str,
) -> bytes:
    """A whole page, UTF-8.

    Args:
        records: canonical records, or failed ones with `error`.
        open_image: the image at a path that a record names.
        made_by: the line under the title: model, seed, settings.
    """
    shown = records[:MAX_DOCUMENTS]
    body = "\n".join(_document(record, open_image, with_heading=len(records) > 1) for record in shown)
    if len(records) > len(shown):
        body += f'<p class="note">{len(records) - len(shown)} more documents stand in results.jsonl.</p>'
    template = Template((files("mm_interleaved.runs") / "page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(title), made_by=escape(made_by), body=body)
    return page.encode("utf-8", "replace")


def title_of(records: Sequence[Mapping[str, Any]]) -> str:
    """What to call a page of these records."""
    if len(records) == 1:
        return _heading(records[0])
    return f"{len(records)} documents"


def panels(parts: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Parts grouped into pages: an image with the text before it, or after it where an image begins."""
    begins_with_image = bool(parts) and parts[0]["type"] == "image"
    pages = [Panel()]
    for part in parts:
        is_image = part["type"] == "image"
        begins_page = is_image if begins_with_image else not is_image
        is_full = pages[-1].image is not None and (is_image or begins_page)
        if is_full:
            pages.append(Panel())
        if is_image:
            pages[-1].image = part
        else:
            pages[-1].texts.append(part)
    return [page for page in pages if page.image or page.texts]


def _document(record: Mapping[str, Any], open_image: OpenImage, *, with_heading: bool) -> str:
    heading = f"<h2>{escape(_heading(record))}</h2>" if with_heading else ""
    if "error" in record:
        message = escape(str(record["error"]["message"]))
        return f'<article>{heading}<div class="error"><b>Not finished.</b> {message}</div></article>'
    if "messages" in record:
        turns = "".join(_turn(message, open_image) for message in record["messages"])
        return f'<article>{heading}<div class="talk">{turns}</div></article>'
    pages = panels(record["content"])
    leaves = [_leaf(page, number, open_image) for number, page in enumerate(pages, start=1)]
    if len(leaves) > 1 and len(leaves) % 2:
        leaves.append('<div class="leaf end">❦</div>')
    kind = "book" if len(leaves) > 1 else "book single"
    return f'<article>{heading}<div class="{kind}">{"".join(leaves)}</div></article>'


def _leaf(page: Panel, number: int, open_image: OpenImage) -> str:
    image = _figure(page.image, open_image) if page.image else ""
    texts = "".join(_paragraphs(text) for text in page.texts)
    kind = "leaf" if page.image else "leaf words"
    return (
        f'<section class="{kind}">{image}<div class="text">{texts}</div><footer>{number}</footer></section>'
    )


def _turn(message: Mapping[str, Any], open_image: OpenImage) -> str:
    inner = "".join(
        _paragraphs(part) if part["type"] == "text" else _figure(part, open_image)
        for part in message["content"]
    )
    role = escape(str(message["role"]))
    return f'<div class="turn {"right" if role == "user" else "left"}"><b>{role}</b>{inner}</div>'


def _paragraphs(part: Mapping[str, Any]) -> str:
    texts = [text.strip() for text in str(part["text"]).split("\n\n") if text.strip()]
    mark = f" {_STAR}" if part.get("generated") else ""
    return "".join(f"<p>{escape(text)}{mark if text is texts[-1] else ''}</p>" for text in texts)


def _figure(part: Mapping[str, Any], open_image: OpenImage) -> str:
    is_generated = bool(part.get("generated"))
    image = open_image(part["image"])
    width, height = image.size
    kind = "crisp" if max(width, height) <= _CRISP_SIDE else "smooth"
    what = "an image generated by the model" if is_generated else "a given image"
    mark = _STAR if is_generated else ""
    size = f'width="{width}" height="{height}"'
    return f'<figure><img class="{kind}" src="{data_url(image)}" {size} alt="{what}">{mark}</figure>'


def data_url(image: PILImage.Image, max_side: int = _MAX_SIDE) -> str:
    """A small image without loss; one beyond half of `max_side` as a JPEG, reduced to that."""
    buffer = io.BytesIO()
    if max(image.size) <= max_side // 2:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((max_side, max_side))
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _heading(record: Mapping[str, Any]) -> str:
    title = record.get("meta", {}).get("title") if isinstance(record.get("meta"), Mapping) else None
    return title if isinstance(title, str) and title else str(record["id"])
