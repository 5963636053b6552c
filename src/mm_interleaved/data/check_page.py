"""The contact sheet of a corpus: one page that needs nothing but itself. No script; all text is escaped."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from PIL import Image as PILImage

from mm_interleaved.data.check_report import Report, Sample, SampledImage, SampledText
from mm_interleaved.data.distributions import histogram, summary

_MAX_BROKEN = 200
_MAX_CHARACTERS = 400
_HISTOGRAMS = (
    ("tokens", "tokens a document"),
    ("images_a_document", "images a document"),
    ("characters", "characters a document"),
    ("shorter_sides", "pixels of the shorter side"),
)


def render_contact_sheet(reports: Sequence[Report]) -> bytes:
    """A whole page, UTF-8, with a section for each report."""
    template = Template((files("mm_interleaved.data") / "check_page.html").read_text(encoding="utf-8"))
    body = "\n".join(_section(report) for report in reports)
    title = reports[0].name if len(reports) == 1 else f"{len(reports)} corpora"
    return template.substitute(title=escape(title), body=body).encode("utf-8", "replace")


def _section(report: Report) -> str:
    counts = [
        ("documents", report.num_documents),
        ("texts", report.num_texts),
        ("images", report.num_images),
        ("broken items", report.num_broken),
        ("broken images", report.num_broken_images),
        ("missing images", report.num_missing_images),
        ("repeated images", report.num_repeated_images),
        *((f"left out: {rule}", count) for rule, count in sorted(report.filtered.items())),
        *((remark, found.count) for remark, found in report.remarks.items()),
    ]
    always = ("documents", "texts", "images", "broken items", "broken images")
    rows = "".join(
        f"<tr{' class=bad' if name.startswith('broken') and count else ''}><th>{escape(name)}</th>"
        f"<td>{count:,}</td></tr>"
        for name, count in counts
        if count or name in always
    )
    charts = "".join(_chart(label, getattr(report, name)) for name, label in _HISTOGRAMS)
    sheet = "".join(_card(sample) for sample in report.samples)
    return (
        f"<section><h2>{escape(report.name)}</h2><div class=figures><table>{rows}</table>{charts}</div>"
        f"{_broken(report)}<div class=sheet>{sheet}</div></section>"
    )


def _chart(label: str, counts: Counter[int]) -> str:
    bars = histogram(counts)
    if not bars:
        return ""
    highest = max(count for _, _, count in bars)
    shown = "".join(
        f'<div class=bar title="{_range(first, last)}: {count:,}">'
        f'<i style="height:{100 * count / highest:.1f}%"></i></div>'
        for first, last, count in bars
    )
    numbers = summary(counts)
    middle = f"median {numbers['median']:,.0f} · mean {numbers['mean']:,.1f}"
    figures = f"{middle} · 95 % at most {numbers['p95']:,.0f}"
    return (
        f"<figure><figcaption>{escape(label)}</figcaption><div class=bars>{shown}</div>"
        f"<div class=ends><span>{numbers['min']:,.0f}</span><span>{numbers['max']:,.0f}</span></div>"
        f"<small>{figures}</small></figure>"
    )


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _broken(report: Report) -> str:
    if not report.broken:
        return ""
    faults = list(report.faults)
    lines = "".join(f"<li>{escape(str(fault))}</li>" for fault in faults[:_MAX_BROKEN])
    total = report.num_broken + report.num_broken_images
    more = f"<li>… and {len(faults) - _MAX_BROKEN:,} kinds more</li>" if len(faults) > _MAX_BROKEN else ""
    is_open = " open" if total <= 20 else ""
    return (
        f"<details class=broken{is_open}><summary>{total:,} broken</summary><ol>{lines}{more}</ol></details>"
    )


def _card(sample: Sample) -> str:
    parts = "".join(_text(part) if isinstance(part, SampledText) else _image(part) for part in sample.parts)
    return f"<article><h3>{escape(sample.id)}</h3>{parts}</article>"


def _text(part: SampledText) -> str:
    shown = part.text if len(part.text) <= _MAX_CHARACTERS else part.text[:_MAX_CHARACTERS] + " …"
    role = f"<b>{escape(part.role)}</b> " if part.role else ""
    return f"<p{' class=target' if part.is_target else ''}>{role}{escape(shown)}</p>"


def _image(part: SampledImage) -> str:
    kind = " class=target" if part.is_target else ""
    if part.thumbnail is None:
        return f"<div{kind or ' class=lost'}>image that cannot be opened</div>"
    width, height = part.size
    return f'<img{kind} alt="" title="{width} by {height}" src="{_data_url(part.thumbnail)}">'


def _data_url(image: PILImage.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
