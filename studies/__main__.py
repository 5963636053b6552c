"""`python -m studies NAME`: the measurements behind the docs, one command each."""

import typer

from mm_interleaved.cli.main import empty_app, main
from studies import commands


def create_app() -> typer.Typer:
    """All studies."""
    app = empty_app("studies", "The measurements behind the docs, one command each.")
    commands.add_to(app)
    return app


if __name__ == "__main__":
    main(create_app)
