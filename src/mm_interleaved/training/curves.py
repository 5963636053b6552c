"""The curves of a run on one page that needs nothing but itself: drawn from `log.jsonl`, no script."""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm_interleaved.files import write_file
from mm_interleaved.training.metrics import read_log
from mm_interleaved.training.settings import LOG_NAME

PAGE_NAME = "curves.html"
_WIDTH, _HEIGHT, _MARGIN = 460, 190, 46
_MAX_POINTS = 400
_SECONDS_BETWEEN = 20.0
_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1000px;padding:0 1em;color:#222;"
    "background:#fff}h1{font-size:1.4em}figure{display:inline-block;margin:0 1em 1em 0}"
    "figcaption{font-weight:600}svg{background:#fafafa;border:1px solid #ddd}"
    "polyline{fill:none;stroke:#2864c8;stroke-width:1.6}text{font-size:11px;fill:#555}"
    "line{stroke:#ddd}"
)


class CurvesPage:
    """A `LogWriter` that keeps `curves.html` beside a stage's log up to date."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn = -math.inf

    def write(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN:
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        log = self.folder / LOG_NAME
        if log.exists():
            write_curves(self.folder / PAGE_NAME, {self.folder.name: read_log(log)})


def write_curves(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws the logs of stages, one after the other.

    Raises:
        StorageError: the page cannot be written.
    """
    sections = [f"<h1>{escape(name)}</h1>{_figures(lines)}" for name, lines in logs.items()]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Curves</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    write_file(path, page.encode())


def _figures(lines: Sequence[Mapping[str, Any]]) -> str:
    names = [
        name for name, value in (lines[-1] if lines else {}).items()
        if isinstance(value, int | float) and name != "step"
    ]  # fmt: skip
    series = {
        name: [
            (float(line["step"]), float(line[name]))
            for line in lines
            if isinstance(line.get(name), int | float)
        ]
        for name in names
    }
    return "".join(_figure(name, points) for name, points in series.items() if points)


def _figure(name: str, points: Sequence[tuple[float, float]]) -> str:
    """One curve; of many points, as many means as can be seen."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    shown = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    first, last = shown[0][0], shown[-1][0]
    low, high = min(value for _, value in shown), max(value for _, value in shown)

    def place(step: float, value: float) -> str:
        x = _MARGIN + (_WIDTH - _MARGIN - 8) * (step - first) / max(1e-12, last - first)
        y = 10 + (_HEIGHT - 34) * (1 - (value - low) / max(1e-12, high - low))
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(*point) for point in shown)
    labels = (
        f'<text x="4" y="16">{high:.4g}</text><text x="4" y="{_HEIGHT - 22}">{low:.4g}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 6}">{first:.0f}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">step {last:.0f}</text>'
    )
    return (
        f"<figure><figcaption>{escape(name)}: {shown[-1][1]:.4g}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(name)} over steps">'
        f'<line x1="{_MARGIN}" y1="{_HEIGHT - 24}" x2="{_WIDTH}" y2="{_HEIGHT - 24}"/>'
        f'{labels}<polyline points="{line}"/></svg></figure>'
    )
