"""Scores with their intervals as inline SVG: a row a metric, a mark a run.

Widths are in percent, so that a plot is as readable on a telephone as on a desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mm_interleaved.evaluation.metrics.confidence import Interval

_ROW, _MARGIN = 16, 10
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHAPES = (
    '<circle r="5"/>',
    '<rect x="-4.5" y="-4.5" width="9" height="9"/>',
    '<path d="M0,-6.2 L6.2,0 L0,6.2 L-6.2,0 Z"/>',
    '<path d="M0,-6 L5.7,4.6 L-5.7,4.6 Z"/>',
    '<path d="M-5.7,-4.6 L5.7,-4.6 L0,6 Z"/>',
    '<path d="M-1.9,-5.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z"/>',
)
"""Runs are told apart by shape as well as by colour."""
NUM_MARKS = len(_SHAPES)


def mark(run: int) -> str:
    """The mark of a run, for legends and headings."""
    kind = f"mark run-{run % NUM_MARKS + 1}"
    return f'<svg class="{kind}" viewBox="-8 -8 16 16" aria-hidden="true">{_shape(run)}</svg>'


def is_plotted(values: Sequence[float | None]) -> bool:
    """Whether all values of a metric lie between 0 and 1, the width of the plot."""
    return any(value is not None for value in values) and all(
        value is None or 0 <= value <= 1 for value in values
    )


def plot(
    rows: Sequence[tuple[str, Sequence[float | None], Sequence[Interval | None]]], names: Sequence[str]
) -> str:
    """The plot of metrics from 0 to 1.

    Args:
        rows: (metric, value of each run, interval of each run).
        names: of the runs.
    """
    legend = "".join(f"<li>{mark(k)} {escape(name)}</li>" for k, name in enumerate(names))
    inner = "".join(f"<dt>{escape(metric)}</dt><dd>{_row(*row, names)}</dd>" for metric, *row in rows)
    ticks = "".join(f'<span style="left:{_x(tick):.1f}%">{tick:g}</span>' for tick in _TICKS)
    return (
        f'<ul class="legend">{legend}</ul><dl class="plot"><dt class="axis"></dt>'
        f'<dd class="axis" aria-hidden="true">{ticks}</dd>{inner}</dl>'
    )


def _row(values: Sequence[float | None], intervals: Sequence[Interval | None], names: Sequence[str]) -> str:
    height = _MARGIN + _ROW * len(values)
    grid = "".join(f'<line class="grid" x1="{_x(t)}%" x2="{_x(t)}%" y1="0" y2="{height}"/>' for t in _TICKS)
    marks, said = "", []
    for k, (value, interval, name) in enumerate(zip(values, intervals, names, strict=True)):
        if value is None:
            continue
        y = _MARGIN / 2 + _ROW * (k + 0.5)
        line = ""
        if interval is not None:
            ends = f'x1="{_x(interval.low):.2f}%" x2="{_x(interval.high):.2f}%"'
            line = f'<line {ends} y1="{y}" y2="{y}"/>'
        shape = f'<svg x="{_x(value):.2f}%" y="{y}" overflow="visible">{_shape(k)}</svg>'
        marks += f'<g class="run-{k % NUM_MARKS + 1}">{line}{shape}</g>'
        bounds = "" if interval is None else f", {interval.low:.3f} to {interval.high:.3f}"
        said.append(f"{name} {value:.3f}{bounds}")
    label = escape("; ".join(said))
    return f'<svg role="img" aria-label="{label}" height="{height}"><title>{label}</title>{grid}{marks}</svg>'


def _x(value: float) -> float:
    """Percent of the width; the ends leave room for the marks."""
    return 2 + 96 * min(max(value, 0), 1)


def _shape(run: int) -> str:
    return _SHAPES[run % NUM_MARKS]
