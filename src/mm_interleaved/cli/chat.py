"""`chat`: a conversation in the terminal; words as they come, pictures as files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.generate import Device, Dtype, Model, checked_file
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.document import Document, Image, Part, Text
from mm_interleaved.errors import InputError
from mm_interleaved.generation.events import Event, ImageDone, TextDelta

_HELP = "/image PATH shows the model a picture, /new forgets the conversation, /quit ends."


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Ready prompts")(chat)


def chat(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for pictures.", metavar="DIR")
    ] = Path("out/chat"),
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
):
    """Talk with the model. Pictures and the conversation (conversation.jsonl) are saved in DIR."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.generation.settings import settings_for
    from mm_interleaved.generation_run import complete
    from mm_interleaved.model_source import find_model, generation_defaults, read_config

    folder = find_model(model)
    defaults = generation_defaults(read_config(folder))
    conversation = Document(id="chat", parts=())
    settings = settings_for(conversation, defaults, flags)
    generator = load_quietly(folder, device=device, dtype=dtype)
    saved = _Pictures(output)

    def show(event: Event):
        if isinstance(event, TextDelta):
            say(event.text, end="")
        elif isinstance(event, ImageDone):
            say(f"\n[{saved.add(event.image)}]")

    if sys.stdin.isatty():
        say(_HELP)
    pending: list[Part] = []
    turn = 0
    while (line := _read_line()) is not None:
        try:
            if line.startswith("/image "):
                pending.append(_picture(line.removeprefix("/image ").strip()))
                continue
            if line == "/quit":
                break
            if line == "/new":
                conversation, pending = Document(id="chat", parts=()), []
                continue
            asked = conversation.extended(*pending, Text(line, role="user"))
            # Each turn draws from a seed of its own, else the same words would always get the same picture.
            turn += 1
            conversation = complete(generator, asked, replace(settings, seed=settings.seed + turn), show)
        except InputError as error:
            say_error(str(error))
            continue
        pending = []
        say()
        saved.write(conversation)


class _Pictures:
    """Numbered pictures in a folder, and the conversation beside them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, picture) -> Path:
        from mm_interleaved.images import to_png
        from mm_interleaved.storage import make_folder, write_file

        make_folder(self.folder)
        number = 1
        while (path := self.folder / f"picture-{number}.png").exists():
            number += 1
        write_file(path, to_png(picture))
        return path

    def write(self, conversation: Document):
        from mm_interleaved.document_formats import write_documents
        from mm_interleaved.storage import make_folder

        make_folder(self.folder)
        write_documents(self.folder / "conversation.jsonl", [conversation])


def _picture(name: str) -> Image:
    picture = Image(checked_file(Path(name)), role="user", name=name)
    picture.load()
    return picture


def _read_line() -> str | None:
    """The next line that says something; None at the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line
