"""The scores as a file, and as a page with the documents and the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.files import make_folder, remove_temporary_files, write_file
from mm_interleaved.runs.page import OpenImage, render_page


def write_report(
    out: Path,
    scores: Mapping[str, float],
    made_by: str,
    records: Sequence[Mapping[str, Any]],
    open_image: OpenImage,
) -> None:
    """Writes scores.json and report.html.

    Args:
        made_by: a sentence on how many documents were answered.
        records: of the answered documents, in the canonical form.
        open_image: gives the image that a record names.
    """
    make_folder(out)
    remove_temporary_files(out)
    write_file(out / "scores.json", json.dumps(scores, indent=2).encode() + b"\n")
    page = render_page(records, open_image, title="Evaluation", made_by=made_by, scores=scores)
    write_file(out / "report.html", page)
