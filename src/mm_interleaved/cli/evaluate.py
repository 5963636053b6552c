"""`evaluate` and `train`."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer):
    """Register the commands of this file."""
