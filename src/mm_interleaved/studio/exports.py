"""A session as files to keep: Markdown with its images, an HTML page, a PDF, a comic, or the session."""

from __future__ import annotations

import io
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mm_interleaved.documents.document import Text, document_to_record
from mm_interleaved.documents.images import to_png
from mm_interleaved.documents.session import Session
from mm_interleaved.errors import UsageError
from mm_interleaved.runs.page import render_page
from mm_interleaved.spelling import unknown_name
from mm_interleaved.studio import drawing
from mm_interleaved.studio.actions import title_of

MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~&$@:])")
"""What Markdown would take for more than a letter."""


@dataclass(frozen=True, slots=True)
class Export:
    """One file."""

    name: str
    kind: str
    """Media type."""
    data: bytes


def export(session: Session, form: str, model: str) -> Export:
    """A session in one of `FORMS`.

    Args:
        model: what it was written with, for the page.

    Raises:
        UsageError: no such form, or nothing to export.
        ImageError: an image cannot be read.
    """
    if form not in FORMS:
        raise UsageError(unknown_name("form", form, FORMS), field="form")
    if not session.tree.nodes or (form != "session" and not session.document.parts):
        raise UsageError("there is nothing to export yet: the document is empty")
    ending, kind, make = FORMS[form]
    return Export(f"{_file_name(session)}.{ending}", kind, make(session, model))


def _markdown(session: Session, model: str) -> bytes:
    """`story.md` and `images/`, in an archive."""
    document, lines, files = session.document, list[str](), dict[str, bytes]()
    if title := title_of(session):
        lines.append(f"# {as_markdown(title)}")
    for part in document.parts:
        if isinstance(part, Text):
            lines.append(as_markdown(part.text.strip()))
            continue
        name = f"images/{len(files) + 1:03}.png"
        files[name] = to_png(part.load())
        lines.append(f"![Picture {len(files)}]({name})")
    return _archive({"story.md": ("\n\n".join(lines) + "\n").encode("utf-8", "replace"), **files})


def as_markdown(text: str) -> str:
    """A text that Markdown shows as it is, line by line."""
    return "\n".join(f"{MARKUP.sub(_escaped, line)}  " for line in text.split("\n")).rstrip()


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found[1]}"


def _html(session: Session, model: str) -> bytes:
    """One page that needs nothing else."""
    document = session.document
    images = list(document.images)
    record = document_to_record(document, lambda image, number: str(number))
    title = title_of(session) or document.id
    return render_page(
        [record], lambda number: images[int(number)].load(), title=title, made_by=f"written with {model}"
    )


def _pdf(session: Session, model: str) -> bytes:
    return drawing.pdf(session.document, title_of(session))


def _comic(session: Session, model: str) -> bytes:
    buffer = io.BytesIO()
    drawing.comic(session.document).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _session(session: Session, model: str) -> bytes:
    """`session.json` and `images/` in an archive: everything, hidden branches too."""
    with tempfile.TemporaryDirectory() as place:
        session.save(place)
        files = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
        return _archive({path.relative_to(place).as_posix(): path.read_bytes() for path in files})


FORMS: dict[str, tuple[str, str, Callable[[Session, str], bytes]]] = {
    "markdown": ("md.zip", "application/zip", _markdown),
    "html": ("html", "text/html; charset=utf-8", _html),
    "pdf": ("pdf", "application/pdf", _pdf),
    "comic": ("png", "image/png", _comic),
    "session": ("session.zip", "application/zip", _session),
}


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A fixed time: the same session is the same file.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _file_name(session: Session) -> str:
    """A plain name out of the title, or of the session's own."""
    title = unicodedata.normalize("NFKD", title_of(session) or session.document.id)
    plain = re.sub(r"[^a-z0-9]+", "-", title.encode("ascii", "ignore").decode("ascii").lower()).strip("-")
    return plain[:60] or "story"
