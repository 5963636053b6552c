"""A story as drawn pages: a comic of panels in a grid, and pages of a book for a PDF. Pillow draws them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import TypeAlias

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mm_interleaved.documents.document import Document, Image, Text

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FONTS = (
    "DejaVuSerif.ttf",
    "NotoSerif-Regular.ttf",
    "LiberationSerif-Regular.ttf",
    "Georgia.ttf",
    "Times New Roman.ttf",
    "times.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
)
"""What systems have, the widest alphabets first; where none is, Pillow's own, which has Latin letters."""
_INK, _FAINT, _PAPER, _FRAME = (53, 41, 29), (141, 123, 99), (253, 248, 236), (217, 201, 168)
_CRISP = 128
"""Images up to this side are enlarged pixel by pixel."""

_PANEL, _GAP, _CAPTION = 480, 28, 26
_PAGE, _MARGIN, _BODY, _HEADING = (1240, 1754), 150, 34, 56
"""A4 at 150 dots per inch."""
DOTS = 150
MAX_PANELS = 64


@cache
def font(size: int) -> Font:
    """The best font for reading that this machine has."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def wrapped(text: str, width: float, face: Font) -> list[str]:
    """Lines that fit a width; words that do not fit alone are broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            candidate = f"{line} {word}" if line else word
            if face.getlength(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            while face.getlength(word) > width and len(word) > 1:
                cut = next(n for n in range(len(word), 0, -1) if n == 1 or face.getlength(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines


def comic(document: Document) -> PILImage.Image:
    """All panels in a grid, each image with the words that belong to it, as one picture."""
    panels = _panels(document)[:MAX_PANELS]
    columns = max(1, min(4, math.ceil(math.sqrt(len(panels)))))
    face = font(_CAPTION)
    cells = [_panel(picture, text, face) for picture, text in panels]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (columns * (_PANEL + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1))
    page = PILImage.new("RGB", (size[0], max(size[1], _PANEL // 2)), _PAPER)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            page.paste(cell, (_GAP + column * (_PANEL + _GAP), top))
        top += height + _GAP
    return page


def pdf(document: Document, title: str) -> bytes:
    """A book as PDF: title, texts and images in order, on as many pages as they need."""
    pages = _Pages()
    if title:
        pages.write(title, font(_HEADING), _INK, after=40)
    for part, following in zip_longest(document.parts, document.parts[1:]):
        if isinstance(part, Text):
            # A picture is not torn from the words before it.
            beside = pages.fit(following.load()).height if isinstance(following, Image) else 0
            pages.write(part.text.strip(), font(_BODY), _INK, after=30, beside=beside)
        elif part is not None:
            pages.place(part.load())
    buffer = io.BytesIO()
    first, *others = pages.pages
    first.save(
        buffer, format="PDF", save_all=True, append_images=others, resolution=DOTS, title=title or document.id
    )
    return buffer.getvalue()


class _Pages:
    """Pages that fill from top to bottom."""

    def __init__(self):
        self.pages: list[PILImage.Image] = []
        self._top = 0
        self._turn()

    def write(self, text: str, face: Font, ink: tuple[int, int, int], *, after: int, beside: int = 0) -> None:
        """Lines from here on; on the same page as `beside` pixels that follow, if one page holds both."""
        height = _line_height(face)
        lines = wrapped(text, _PAGE[0] - 2 * _MARGIN, face)
        together = len(lines) * height + after + beside
        if together < _PAGE[1] - 2 * _MARGIN:
            self._make_room(together)
        for line in lines:
            self._make_room(height)
            self._draw.text((_MARGIN, self._top), line, font=face, fill=ink)
            self._top += height
        self._top += after

    @staticmethod
    def fit(image: PILImage.Image) -> PILImage.Image:
        """An image as a page shows it: two of them, with some words, go on one."""
        return fitted(image, _PAGE[0] - 2 * _MARGIN, (_PAGE[1] - 2 * _MARGIN) * 2 // 5)

    def place(self, image: PILImage.Image) -> None:
        shown = self.fit(image)
        self._make_room(shown.height)
        self.pages[-1].paste(shown, ((_PAGE[0] - shown.width) // 2, self._top))
        self._top += shown.height + 36

    def _make_room(self, height: int) -> None:
        if self._top + height > _PAGE[1] - _MARGIN and self._top > _MARGIN:
            self._turn()

    def _turn(self) -> None:
        self.pages.append(PILImage.new("RGB", _PAGE, "white"))
        self._draw = ImageDraw.Draw(self.pages[-1])
        number, face = str(len(self.pages)), font(24)
        place = ((_PAGE[0] - face.getlength(number)) / 2, _PAGE[1] - _MARGIN // 2)
        self._draw.text(place, number, font=face, fill=_FAINT)
        self._top = _MARGIN


def fitted(image: PILImage.Image, width: int, height: int) -> PILImage.Image:
    """An image as large as fits; small ones keep their pixels as squares."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    way = PILImage.Resampling.NEAREST if max(image.size) <= _CRISP else PILImage.Resampling.LANCZOS
    return image.resize(size, way)


def _panel(picture: Image | None, text: str, face: Font) -> PILImage.Image:
    """One cell of a comic: an image in a frame, its words below."""
    lines = wrapped(text, _PANEL, face) if text else []
    shown = fitted(picture.load(), _PANEL, 2 * _PANEL) if picture else None
    picture_height = shown.height + 16 if shown else 0
    height = picture_height + len(lines) * _line_height(face)
    cell = PILImage.new("RGB", (_PANEL, max(1, height)), _PAPER)
    draw = ImageDraw.Draw(cell)
    if shown:
        left = (_PANEL - shown.width) // 2
        cell.paste(shown, (left, 0))
        draw.rectangle((left, 0, left + shown.width - 1, shown.height - 1), outline=_FRAME, width=3)
    for number, line in enumerate(lines):
        draw.text((0, picture_height + number * _line_height(face)), line, font=face, fill=_INK)
    return cell


def _panels(document: Document) -> Sequence[tuple[Image | None, str]]:
    """Images with the words before them, or behind them where the document begins with an image."""
    begins_with_image = bool(document.parts) and isinstance(document.parts[0], Image)
    panels: list[tuple[Image | None, str]] = [(None, "")]
    for part in document.parts:
        picture, text = panels[-1]
        if isinstance(part, Image):
            if picture is not None or (begins_with_image and text):
                panels.append((part, ""))
            else:
                panels[-1] = (part, text)
        elif picture is not None and not begins_with_image:
            panels.append((None, part.text.strip()))
        else:
            panels[-1] = (picture, f"{text} {part.text.strip()}".strip())
    return [panel for panel in panels if panel[0] is not None or panel[1]]


def _line_height(face: Font) -> int:
    box = face.getbbox("Ägÿ")
    return math.ceil((box[3] - min(0, box[1])) * 1.35)
