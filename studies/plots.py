"""How the studies plot: matplotlib where it is installed, axes without a frame, the same file each time."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from mm_interleaved.errors import UsageError
from mm_interleaved.files import write_file


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. Raises UsageError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'mm-interleaved[bench]'") from error
    return pyplot


def plain_axes(axes: Any) -> None:
    """Takes away the two sides of the frame that carry no numbers."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plain_numbers(axes: Any, ticks: Sequence[float] | None = None) -> None:
    """Numbers of a logarithmic height as one writes them, 0.2 and not 2 times ten to the minus one."""
    load_pyplot()
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    low, high = axes.get_ylim()
    # Within one power of ten there may be no other numbers than the small ones.
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g") if high < 10 * low else NullFormatter())
    if ticks is not None:
        axes.set_yticks(ticks)
        axes.yaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG and closes it."""
    png = BytesIO()
    # Without a date, so that the same results give the same file.
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    write_file(path, png.getvalue())
    load_pyplot().close(figure)
