"""What a model looked at, written for people and programs: a page, overlays, arrays.

index.html          the document; a word or a place of an image shows where the model sampled for it
overlays/part_K.png the earlier images under the heat of part K: all places, then each layer or U-Net map
arrays.npz          the tensors of `Explanation.arrays`, axes in their names' letters
explanation.json    what the axes mean: tokens, places, images, levels
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import fit_square, to_png
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.runs.page import data_url

if TYPE_CHECKING:
    from torch import Tensor

    from mm_interleaved.generation.explanation import Explanation, ImageAttention, TextAttention

PAGE, ARRAYS, LABELS, OVERLAYS = "index.html", "arrays.npz", "explanation.json", "overlays"
MAX_PAGE_VALUES = 24_000_000
"""Of one image's heat maps on the page; coarser ones take their place. The arrays have all."""
SAME_IMAGE = 0.5
"""Levels of 0 to 255 in the mean: what differs less was computed in another order."""
_TILE, _GAP, _STRIP = 160, 6, 22
_HEAT = np.array([255, 64, 0], np.float32)
_CRISP_SIDE = 128


def write_explanation(folder: Path, explanation: Explanation, title: str, made_by: str) -> Path:
    """Writes all of it into a folder; returns the page."""
    make_folder(folder / OVERLAYS)
    squares = _squares(explanation)
    for part, sheet in _sheets(explanation, squares):
        write_file(folder / OVERLAYS / f"part_{part}.png", to_png(sheet))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **explanation.arrays())  # pyright: ignore[reportArgumentType]
    write_file(folder / ARRAYS, buffer.getvalue())
    labels = json.dumps(labels_of(explanation), ensure_ascii=False, indent=1)
    write_file(folder / LABELS, f"{labels}\n".encode("utf-8", "backslashreplace"))
    write_file(folder / PAGE, render(explanation, squares, title, made_by))
    return folder / PAGE


def explanation_page(explanation: Explanation, title: str, made_by: str) -> bytes:
    """The page alone, UTF-8, self-contained."""
    return render(explanation, _squares(explanation), title, made_by)


def labels_of(explanation: Explanation) -> dict[str, Any]:
    """What stands where along the axes of the arrays."""
    text = explanation.text
    return {
        "document": explanation.document.id,
        "text": None
        if text is None
        else {
            "T": [{"token": t, "part": p} for t, p in zip(text.tokens, text.parts, strict=True)],
            "Y": text.places,
            "N": [f"part {part}" for part in text.images],
            "L": [f"{size} x {size} cells" for size in text.level_sizes],
        },
        **{
            f"part{one.part}": {
                "R": f"{one.regions} x {one.regions} regions, row by row",
                "Y": one.places,
                "N": [f"part {part}" for part in one.images],
                "L": [f"{size} x {size} cells" for size in one.level_sizes],
                "pixel_error": one.pixel_error,
            }
            for one in explanation.images
        },
    }


def _squares(explanation: Explanation) -> dict[int, PILImage.Image]:
    """The images by part, cut square as the model sees them."""
    parts = enumerate(explanation.document.parts)
    found = {place: part.load() for place, part in parts if isinstance(part, Image)}
    return {place: fit_square(image, min(image.size)) for place, image in found.items()}


# ---- Overlays ------------------------------------------------------------------------------------------


def _sheets(
    explanation: Explanation, squares: Mapping[int, PILImage.Image]
) -> list[tuple[int, PILImage.Image]]:
    from mm_interleaved.generation.explanation import text_heat

    sheets: list[tuple[int, PILImage.Image]] = []
    text, document = explanation.text, explanation.document
    for place in [] if text is None else sorted(set(text.parts)):
        assert text is not None
        tokens = [token for token, part in enumerate(text.parts) if part == place]
        heat = text_heat(text, tokens)
        if float(heat.sum()) > 0:
            part = document.parts[place]
            title = f"part {place}: {part.text[:60] if isinstance(part, Text) else ''}"
            # Images that come later were not seen.
            seen = [n for n, image in enumerate(text.images) if image < place]
            shown = [squares[text.images[n]] for n in seen]
            sheets.append((place, sheet(heat[:, seen], text.places, shown, title)))
    for one in explanation.images:
        heat = one.heat_RYHNLGG.mean((0, 2)).sum(2)
        title = f"part {one.part}: an image, mean of its regions"
        sheets.append((one.part, sheet(heat, one.places, [squares[n] for n in one.images], title)))
    return sheets


def sheet(
    heat_YNGG: Tensor, places: Sequence[str], images: Sequence[PILImage.Image], title: str
) -> PILImage.Image:
    """Images in columns under their heat: the mean of all places, then each of them in its row. In a row, the
    heaviest cell is opaque.
    """
    rows = [("all", heat_YNGG.mean(0)), *zip(places, heat_YNGG, strict=True)]
    width = max(len(images) * (_TILE + _GAP) + _GAP, 3 * _TILE)
    canvas = PILImage.new("RGB", (width, _STRIP + len(rows) * (_TILE + _STRIP + _GAP)), (255, 255, 255))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((_GAP, 3), title, fill=(30, 30, 36), font=font)
    for row, (place, heat_NGG) in enumerate(rows):
        top, peak = _STRIP + row * (_TILE + _STRIP + _GAP), max(float(heat_NGG.max()), 1e-12)
        for column, (image, heat) in enumerate(zip(images, heat_NGG, strict=True)):
            left = _GAP + column * (_TILE + _GAP)
            draw.text((left, top + 3), f"{place}: {float(heat.sum()):.1%}", fill=(30, 30, 36), font=font)
            canvas.paste(overlay(image, heat.numpy() / peak, _TILE), (left, top + _STRIP))
    return canvas


def overlay(image: PILImage.Image, heat: np.ndarray, side: int) -> PILImage.Image:
    """A square image, `side` pixels wide, under its heat (G, G), 0 to 1."""
    smooth = PILImage.fromarray(heat.astype(np.float32)).resize((side, side), PILImage.Resampling.BILINEAR)
    opacity = np.sqrt(np.clip(np.asarray(smooth), 0, 1))[..., None] * 0.9
    kind = PILImage.Resampling.NEAREST if image.width < side else PILImage.Resampling.LANCZOS
    pixels = np.asarray(image.resize((side, side), kind), np.float32)
    grey = pixels.mean(-1, keepdims=True)
    dimmed = 0.5 * pixels + 0.35 * grey + 0.15 * 255
    return PILImage.fromarray((dimmed * (1 - opacity) + _HEAT * opacity).astype(np.uint8))


# ---- The page ------------------------------------------------------------------------------------------


def render(
    explanation: Explanation, squares: Mapping[int, PILImage.Image], title: str, made_by: str
) -> bytes:
    """The page, UTF-8, self-contained: nothing is loaded from anywhere."""
    document, images = explanation.document, {one.part: one for one in explanation.images}
    numbers = {place: number for number, place in enumerate(squares, start=1)}
    data = {
        "text": None if explanation.text is None else _text_data(explanation.text),
        "regions": {str(place): _image_data(one) for place, one in images.items()},
    }
    is_small = all(max(image.size) <= _CRISP_SIDE for image in squares.values())
    template = Template((files("mm_interleaved.runs") / "explanation.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        made_by=escape(made_by),
        rendering="pixelated" if is_small else "auto",
        body=_body(document, explanation.text, images, squares, numbers),
        seen="\n".join(
            f'<figure class="far" data-part="{place}" data-number="{numbers[place]}"><div class="frame">'
            f'<img src="{data_url(image)}" alt="image {numbers[place]}"><canvas></canvas></div>'
            f"<figcaption>image {numbers[place]} <b></b></figcaption></figure>"
            for place, image in squares.items()
        ),
        # Within a script, nothing may look like its end.
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    return page.encode("utf-8", "replace")


def _body(
    document: Document,
    text: TextAttention | None,
    images: Mapping[int, ImageAttention],
    squares: Mapping[int, PILImage.Image],
    numbers: Mapping[int, int],
) -> str:
    found: list[str] = []
    for place, part in enumerate(document.parts):
        role = f"<small>{escape(part.role)}: </small>" if part.role else ""
        if isinstance(part, Text):
            found.append(f"<p>{role}{_words(place, part, text)}</p>")
            continue
        made = "generated" if part.generated else "given"
        note, kind = f"image {numbers[place]}, {made}", ""
        if place in images:
            kind, note = ' class="ask"', f"{note}: point at a place{_doubt(images[place].pixel_error)}"
        focus = ' tabindex="0" role="application"' if place in images else ""
        found.append(
            f'<figure{kind} data-part="{place}"><div class="frame"{focus} aria-label="{note}">'
            f'<img src="{data_url(squares[place])}" alt="{note}"><div class="place"></div></div>'
            f"<figcaption>{note}</figcaption></figure>"
        )
    return "\n".join(found)


def _doubt(pixel_error: float | None) -> str:
    """What to say where the image that was denoised again is another one than the document's."""
    if pixel_error is not None and pixel_error < SAME_IMAGE:
        return ""
    other = "has another size" if pixel_error is None else f"differs by {pixel_error:.1f} of 255 levels"
    return f". With these settings it {other}: the maps are those of a similar image"


def _words(place: int, part: Text, text: TextAttention | None) -> str:
    tokens = [] if text is None else [n for n, each in enumerate(text.parts) if each == place]
    if text is None or not tokens:
        return escape(part.text)
    kind = "t made" if part.generated else "t"
    return "".join(
        f'<span class="{kind}" role="button" data-token="{token}">{escape(text.tokens[token])}</span>'
        for token in tokens
    )


def _text_data(text: TextAttention) -> dict[str, Any]:
    _, places, heads, images, levels, points = text.weight_TYHNLP.shape
    location = ((text.location_TYHNP2.numpy() + 0.5) / 2).clip(0, 1) * 65535
    return {
        "shape": [places, heads, images, levels, points],
        "places": text.places,
        "images": text.images,
        "levels": text.level_sizes,
        "location": _packed(location.round().astype("<u2"), 16, 1.0),
        "weight": _weights(text.weight_TYHNLP.numpy()),
    }


def _image_data(one: ImageAttention) -> dict[str, Any]:
    heat = one.heat_RYHNLGG.numpy()
    while heat.size > MAX_PAGE_VALUES and heat.shape[-1] % 2 == 0:
        rows, columns = (heat[..., start::2, :] for start in (0, 1))
        heat = rows + columns
        heat = heat[..., 0::2] + heat[..., 1::2]
    return {
        "side": one.regions,
        "shape": list(heat.shape[1:-1]),
        "places": one.places,
        "images": one.images,
        "levels": one.level_sizes,
        "heat": _weights(heat),
    }


def _weights(weights: np.ndarray) -> dict[str, Any]:
    """Weights as the roots of their shares of the greatest, in eight bits."""
    scale = max(float(weights.max(initial=0)), 1e-12)
    roots = np.sqrt(weights.clip(0) / scale) * 255
    return _packed(roots.round().astype(np.uint8), 8, scale)


def _packed(values: np.ndarray, bits: int, scale: float) -> dict[str, Any]:
    data = gzip.compress(values.tobytes(), mtime=0)
    return {"bits": bits, "scale": scale, "data": base64.b64encode(data).decode("ascii")}
