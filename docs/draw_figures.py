"""Draws the figures of docs/architecture.md into docs/images: the line, and the storeys as the code has them.

python docs/draw_figures.py      (matplotlib: pip install -e ".[bench]")
"""

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "mm_interleaved"
LAWS = DOCS.parent / "tests" / "unit" / "test_laws.py"
OURS, STOCK, DATA, EDGE, GREEN = "#dcebdc", "#e4e4ee", "#fbf1d9", "#444444", "#3d7a3d"
FILE = {"fontsize": 6.3, "color": "#555555", "family": "monospace"}

BOXES = {
    # name: (x, y, width, height, colour, title, file)
    "document": (0.0, 6.6, 2.7, 1.1, DATA, "Document", "documents/document.py"),
    "tokens": (3.3, 6.6, 3.2, 1.1, OURS, "token ids + image slots", "tokens/processor.py"),
    "clip": (0.0, 4.5, 2.7, 1.1, STOCK, "CLIP", "models/vision.py"),
    "adapter": (3.3, 4.5, 3.2, 1.1, OURS, "ViT-Adapter", "models/adapter.py"),
    "slots": (7.3, 5.1, 2.7, 0.9, OURS, "slot embeddings", "models/resampler.py"),
    "pyramid": (7.3, 4.0, 2.7, 0.9, DATA, "feature pyramid", "models/vision.py"),
    "attention": (7.2, 6.8, 1.9, 0.75, STOCK, "self-attention", ""),
    "synchronizer": (9.4, 6.8, 2.6, 0.75, OURS, "synchronizer", "models/synchronizer.py"),
    "mlp": (12.3, 6.8, 1.0, 0.75, STOCK, "MLP", ""),
    "text": (14.4, 6.6, 2.8, 1.1, OURS, "next token", "generation/text.py"),
    "prefix": (14.4, 2.1, 2.8, 1.1, OURS, "prefix: hidden states", "models/context.py"),
    "resampler": (11.0, 2.1, 2.7, 1.1, OURS, "resampler", "models/resampler.py"),
    "unet": (6.9, 1.7, 3.3, 1.9, STOCK, "", ""),
    "vae": (3.4, 2.1, 2.8, 1.1, STOCK, "VAE", "models/image_decoder.py"),
    "image": (0.0, 2.1, 2.8, 1.1, DATA, "Image", "generation/continuation.py"),
}
ARROWS = (
    # (from, side, to, side, label)
    ("document", "right", "tokens", "left", ""),
    ("document", "bottom", "clip", "top", "images"),
    ("adapter", "right", "slots", "left", ""),
    ("adapter", "right", "pyramid", "left", ""),
    ("slots", "top", "attention", "bottom", ""),
    ("tokens", "right", "attention", "left", ""),
    ("attention", "right", "synchronizer", "left", ""),
    ("synchronizer", "right", "mlp", "left", ""),
    ("mlp", "right", "text", "left", ""),
    ("text", "bottom", "prefix", "top", "at <image start>"),
    ("prefix", "left", "resampler", "right", ""),
    ("resampler", "left", "unet", "right", ""),
    ("unet", "left", "vae", "right", ""),
    ("vae", "left", "image", "right", ""),
)


def draw_line(path: Path) -> None:
    """The one line of the design, with the file that does each box."""
    figure, axes = plt.subplots(figsize=(13.5, 6.2))
    axes.add_patch(_rounded(7.0, 6.35, 6.5, 1.85, "#f4f4f8", dashed=True))
    axes.text(7.15, 7.88, "LLM, one decoder layer", fontsize=9, color=EDGE)
    axes.text(13.35, 7.88, "models/language.py", ha="right", **FILE)
    for x, y, width, height, colour, title, file in BOXES.values():
        axes.add_patch(_rounded(x, y, width, height, colour))
        lift = 0.14 if file else 0
        axes.text(x + width / 2, y + height / 2 + lift, title, ha="center", va="center", fontsize=9)
        axes.text(x + width / 2, y + height / 2 - 0.22, file, ha="center", va="center", **FILE)
    axes.add_patch(_rounded(7.15, 1.85, 2.8, 0.8, OURS))
    axes.text(8.55, 2.37, "synchronizers", ha="center", va="center", fontsize=9)
    axes.text(8.55, 2.05, "models/unet.py", ha="center", va="center", **FILE)
    axes.text(8.55, 3.2, "U-Net, denoising", ha="center", va="center", fontsize=9)
    axes.text(8.55, 2.88, "generation/diffusion.py", ha="center", va="center", **FILE)
    for start, start_side, end, end_side, label in ARROWS:
        _arrow(axes, _point(start, start_side), _point(end, end_side), label)
    # CLIP and the adapter exchange features between their stages.
    _arrow(axes, (2.7, 5.2), (3.3, 5.2), "")
    _arrow(axes, (3.3, 4.9), (2.7, 4.9), "")
    _arrow(axes, (10.0, 4.6), (10.7, 6.8), "pyramids of visible images", colour=GREEN, place=(10.65, 5.5))
    _arrow(axes, (8.55, 4.0), (8.55, 3.6), "of earlier images", colour=GREEN, place=(8.75, 3.8))
    # Back to the document.
    bend = "arc,angleA=180,angleB=180,armA=30,armB=30,rad=10"
    style = {"arrowstyle": "-|>", "color": EDGE, "connectionstyle": bend}
    axes.annotate("", xy=(0.0, 7.15), xytext=(0.0, 2.65), arrowprops=style)
    axes.text(-0.95, 4.9, "appended, encoded, kept", rotation=90, fontsize=8.5, color=EDGE, va="center")
    _arrow(axes, (17.2, 7.15), (17.7, 7.15), "")
    axes.text(17.75, 7.15, "text", va="center", fontsize=9.5)
    for place, (colour, text) in enumerate(((OURS, "ours"), (STOCK, "stock classes"), (DATA, "data"))):
        axes.add_patch(_rounded(11.2 + 2.3 * place, 0.75, 0.35, 0.3, colour))
        axes.text(11.7 + 2.3 * place, 0.9, text, va="center", fontsize=8.5)
    _save(figure, axes, path, (-1.1, 18.4), (0.6, 8.4))


def rooms() -> list[str]:
    """The storeys from the ground up, as tests/unit/test_laws.py holds them; those that exist."""
    for node in ast.walk(ast.parse(LAWS.read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Name(id="ROOMS")], value=value):
                return [name for name in ast.literal_eval(value) if (PACKAGE / name).is_dir()]
    raise AssertionError("test_laws.py names the ROOMS")


def imported_rooms(room: str, names: list[str]) -> set[str]:
    """The other rooms that a room's files import from."""
    found = set()
    for file in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mm_interleaved."):
                found.add(node.module.split(".")[1])
    return found & set(names) - {room}


def draw_storeys(path: Path) -> None:
    """Which room imports which: a dot where the room of the row imports from the room of the column."""
    names = rooms()
    figure, axes = plt.subplots(figsize=(8.2, 5.2))
    for row, room in enumerate(names):
        axes.add_patch(_rounded(0.0, row + 0.12, 2.6, 0.76, OURS))
        axes.text(1.3, row + 0.5, f"{room}/", ha="center", va="center", fontsize=9.5, family="monospace")
        axes.plot([2.6, 3.1 + 0.62 * row], [row + 0.5] * 2, color="#dddddd", lw=0.8, zorder=0)
        for column, other in enumerate(names):
            if other in imported_rooms(room, names):
                axes.plot(3.2 + 0.62 * column, row + 0.5, "o", color=GREEN, ms=6.5)
    for column, room in enumerate(names):
        axes.text(
            3.2 + 0.62 * column,
            -0.15,
            room,
            rotation=55,
            ha="right",
            va="top",
            fontsize=8,
            family="monospace",
        )
    axes.text(0.0, len(names) + 0.25, "a storey imports ●  from storeys below it", fontsize=9.5, color=EDGE)
    _save(figure, axes, path, (-0.3, 3.4 + 0.62 * len(names)), (-2.4, len(names) + 0.8))


def _rounded(x: float, y: float, width: float, height: float, colour: str, *, dashed: bool = False):
    return FancyBboxPatch(
        (x + 0.05, y + 0.05), width - 0.1, height - 0.1, boxstyle="round,pad=0.05,rounding_size=0.12",
        facecolor=colour, edgecolor=EDGE, linewidth=0.8, linestyle="--" if dashed else "-",
        zorder=0 if dashed else 1,
    )  # fmt: skip


def _point(name: str, side: str) -> tuple[float, float]:
    x, y, width, height = BOXES[name][:4]
    return {
        "left": (x, y + height / 2),
        "right": (x + width, y + height / 2),
        "top": (x + width / 2, y + height),
        "bottom": (x + width / 2, y),
    }[side]


def _arrow(axes, start, end, label: str, *, colour: str = EDGE, place=None) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.1})
    if label:
        x, y = place or ((start[0] + end[0]) / 2 + 0.12, (start[1] + end[1]) / 2)
        axes.text(x, y, label, fontsize=8.5, color=colour, va="center")


def _save(figure, axes, path: Path, x_range, y_range) -> None:
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_line(DOCS / "images" / "architecture_line.png")
    draw_storeys(DOCS / "images" / "architecture_storeys.png")
