"""What the pages of evaluations are made of: escaped text, parts of documents, tables, the page around them.

A page is one file: images are inlined, nothing is loaded from anywhere, and there is no script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.errors import InputError
from mm_interleaved.errors import escape as printable
from mm_interleaved.runs.page import data_url

_MAX_SIDE = 320
_CRISP_SIDE = 128
_MAX_TEXT = 2000
_MAX_ANCHOR_TEXT = 160


def text_of(value: object) -> str:
    """Any text as text of a page."""
    return escape(str(value))


def name_text(name: str) -> str:
    """An id or a name, cut and without control characters."""
    return escape(printable(name, _MAX_ANCHOR_TEXT))


def words_of_name(name: str) -> str:
    """A name of the code as words: `body_colour` gives "body colour"."""
    return escape(name.replace("_", " "))


def page(title: str, made_by: str, sections: Sequence[tuple[str, str, str]], style: str = "") -> bytes:
    """A whole page, UTF-8.

    Args:
        made_by: the line under the title.
        sections: (anchor, heading, body); those without a body are left out.
        style: further rules, which hold no text of users.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in shown)
    body = "\n".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-head">'
        f'<h2 id="{anchor}-head">{escape(heading)}</h2>{content}</section>'
        for anchor, heading, content in shown
    )
    template = Template((files("mm_interleaved.evaluation.pages") / "page.html").read_text(encoding="utf-8"))
    filled = template.substitute(
        title=escape(title), made_by=escape(made_by), links=links, body=body, style=style
    )
    return filled.encode("utf-8", "replace")


Row = tuple[str, Sequence[str]]
"""Its head, markup, and its cells, whole `<td>` elements."""


def table(caption: str, heads: Sequence[str], rows: Iterable[Row], kind: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        caption: says what the table shows.
        heads: of the columns, the first that of the row heads; markup.
    """
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in rows)
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table class="{kind}">'
        f"<caption>{label}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


NONE = '<td class="none">\N{EN DASH}</td>'
"""The cell of what there is not."""


def cell(content: str, *, share: float | None = None, is_good: bool = False) -> str:
    """One cell.

    Args:
        content: markup.
        share: 0 to 1, how strongly it is coloured: as what is right if `is_good`, else as what is wrong.
    """
    if share is None:
        return f"<td>{content}</td>"
    return f'<td class="{"right" if is_good else "heat"}" style="--share:{share:.3f}">{content}</td>'


def parts_markup(parts: Sequence[Part], what: str) -> str:
    """Parts in their order; each image with the text before it, or after it where an image begins.

    Args:
        what: says whose parts they are, for those who do not see the images: "the answer".
    """
    begins_with_image = bool(parts) and isinstance(parts[0], Image)
    tiles: list[str] = []
    left, number = list(parts), 0
    while left:
        pair = left[1::-1] if begins_with_image else left[:2]
        if len(pair) == 2 and isinstance(pair[0], Text) and isinstance(pair[1], Image) and not pair[0].role:
            text, part, taken = pair[0].text, pair[1], 2
        else:
            text, part, taken = "", left[0], 1
        if isinstance(part, Image):
            number += 1
            tiles.append(_tile(part, text, f"{what}, image {number}"))
        else:
            tiles.append(_paragraph(part))
        del left[:taken]
    return f'<div class="parts">{"".join(tiles)}</div>' if tiles else '<p class="nothing">nothing</p>'


def side(heading: str, content: str) -> str:
    """One of the things that stand beside each other in a document's card; what was asked stands above."""
    kind = "side asked" if heading == "asked" else "side"
    return f'<div class="{kind}"><b>{heading}</b>{content}</div>'


def _tile(image: Image, text: str, alt: str) -> str:
    caption = f"<figcaption>{escape(_cut(text))}</figcaption>" if text.strip() else ""
    try:
        loaded = image.load()
    except InputError as error:
        return f'<figure class="broken">{escape(str(error))}{caption}</figure>'
    width, height = loaded.size
    kind = "crisp" if max(width, height) <= _CRISP_SIDE else "smooth"
    size = f'width="{width}" height="{height}"'
    url = data_url(loaded, _MAX_SIDE)
    return f'<figure><img class="{kind}" src="{url}" {size} alt="{escape(alt)}">{caption}</figure>'


def _paragraph(part: Text) -> str:
    role = f'<b class="role">{escape(part.role)}</b> ' if part.role else ""
    return f"<p>{role}{escape(_cut(part.text))}</p>"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " …"


def number_text(value: float) -> str:
    """A score as it is written: three decimals, fewer where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share in percent, without decimals; `<1` for what is not nothing."""
    if 0 < share < 0.01:
        return "&lt;1 %"
    return f"{100 * share:.0f} %"
