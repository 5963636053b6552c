"""`chat`: a conversation in the terminal; text as it comes, images as files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.generate import checked_file
from mm_interleaved.cli.options import Device, Dtype, Model
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.cli.places import folder_to_write
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.generation.events import Event, ImageDone, TextDelta
from mm_interleaved.spelling import unknown_name

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from mm_interleaved.generation import InterleavedGenerator
    from mm_interleaved.generation.settings import GenerationSettings

_COMMANDS = {
    "/image": "/image PATH gives the model an image; /image PATH QUESTION asks about it at once.",
    "/draw": "/draw TEXT generates an image of a text; after /image PATH, it changes that image.",
    "/new": "/new forgets the conversation.",
    "/help": "/help lists these commands.",
    "/quit": "/quit ends, as the end of the input does.",
}
_HELP = "Say something, or use a command:\n" + "\n".join(f"  {line}" for line in _COMMANDS.values())
_IMAGE_NAME = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def add_to(app: typer.Typer):
    """Register the command of this file."""
    command(app, panel="Ready prompts")(chat)


def chat(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for images.", metavar="DIR", callback=folder_to_write),
    ] = Path("out/chat"),
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
):
    """Talk with the model. Images and the conversation (conversation.jsonl) are saved in DIR.

    /image PATH gives it an image, /draw TEXT asks for one; /help lists all commands of the conversation.
    """
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.generation.defaults import generation_defaults
    from mm_interleaved.generation.settings import settings_for
    from mm_interleaved.model_files.config import read_config
    from mm_interleaved.model_files.resolve import find_model

    folder = find_model(model)
    settings = settings_for(Document(id="chat", parts=()), generation_defaults(read_config(folder)), flags)
    conversation = _Conversation(load_quietly(folder, device=device, dtype=dtype), settings, output)
    if sys.stdin.isatty():
        say(_HELP)
    while (line := _read_line()) is not None and line != "/quit":
        try:
            conversation.take(line)
        except (InputError, UsageError) as error:
            say_error(str(error))


class _Conversation:
    """The conversation so far, with the images given and generated, and what each line does to it."""

    def __init__(self, generator: InterleavedGenerator, settings: GenerationSettings, folder: Path):
        self.generator, self.settings, self.saved = generator, settings, _Saved(folder)
        self.turn, self.is_line_open = 0, False
        self.current = Document(id="chat", parts=())
        self.earlier, self.drawn = list[Document](), list[Document]()
        self.forget()

    def take(self, line: str):
        """One line of the user's: a command, or text for the model."""
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.ask(line)
        elif (act := self._commands().get(name)) is not None:
            act(rest.strip())
        else:
            raise UsageError(unknown_name("command of a conversation", name, _COMMANDS))

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/image": self.show,
            "/draw": self.draw,
            "/new": lambda rest: self.forget(),
            "/help": lambda rest: say(_HELP),
        }

    def forget(self):
        """Begins a new conversation; the one before stays in the file."""
        if self.current.parts:
            self.earlier.append(self.current)
            self.current = Document(id=f"chat-{len(self.earlier) + 1}", parts=())
        self.given, self.newest = list[Image](), list[Image]()

    def show(self, rest: str):
        """An image, and what is asked about it, if anything."""
        path, question = split_path(rest)
        image = Image(checked_file(path, "/image"), role="user", name=str(path))
        image.load()
        self.given.append(image)
        if question:
            self.ask(question)

    def ask(self, text: str):
        """Text for the model, after the images given since the last one, or the one generated; its answer."""
        asked = self.current.extended(*(self.given or self.newest), Text(text, role="user"))
        self.current = self._complete(asked, layout=self.settings.layout)
        self._save()

    def draw(self, text: str):
        """An image of a text, which is a document of its own: models are trained on images of captions."""
        if not text:
            raise UsageError("/draw: found no text, expected /draw TEXT")
        images = [Image(image.source, name=image.name) for image in self.given]
        # The seed of a document follows from its id: another word here would be another image.
        document = Document(id=f"drawing-{len(self.drawn) + 1}", parts=(*images, Text(text)))
        self.drawn.append(self._complete(document, layout="I"))
        self._save()
        self.newest = [Image(self.drawn[-1].images[-1].source, role="user")]

    def _complete(self, document: Document, layout: str) -> Document:
        from mm_interleaved.generation.settings import GenerationSettings
        from mm_interleaved.runs.generate import complete

        # Each turn has a seed of its own, else the same text would always get the same image.
        self.turn += 1
        own = {"layout": layout, "seed": self.settings.seed + self.turn}
        settings = GenerationSettings.combine(self.settings.to_dict(), own)
        completed = complete(self.generator, document, settings, self._show)
        if self.is_line_open:
            self._say("")
        return completed

    def _show(self, event: Event):
        if isinstance(event, TextDelta):
            say(event.text, end="")
            self.is_line_open = True
        elif isinstance(event, ImageDone):
            self._say(f"[{self.saved.add(event.image)}]")

    def _say(self, line: str):
        """A line of its own."""
        say(f"\n{line}" if self.is_line_open and line else line)
        self.is_line_open = False

    def _save(self):
        talks = [each for each in (*self.earlier, self.current) if each.parts]
        self.saved.write([*talks, *self.drawn])
        self.given, self.newest = [], []


class _Saved:
    """Numbered images in a folder; conversations and generated images, a document a line, beside them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: Path | None = None

    def add(self, image: PILImage.Image) -> Path:
        from mm_interleaved.documents.images import to_png
        from mm_interleaved.files import make_folder, write_file

        make_folder(self.folder)
        path = self._free("image-{}.png", 1)
        write_file(path, to_png(image))
        return path

    def write(self, documents: list[Document]):
        from mm_interleaved.documents.document_files import write_documents
        from mm_interleaved.files import make_folder

        make_folder(self.folder)
        if self.file is None:
            # What an earlier conversation left in the folder stays.
            first = self.folder / "conversation.jsonl"
            self.file = self._free("conversation-{}.jsonl", 2) if first.exists() else first
        write_documents(self.file, documents)

    def _free(self, pattern: str, number: int) -> Path:
        while (path := self.folder / pattern.format(number)).exists():
            number += 1
        return path


def split_path(rest: str) -> tuple[Path, str]:
    """The path that `rest` begins with, and the text after it.

    A path may stand in quotes. Otherwise it is as long as there is such a file, so that it may hold blanks,
    escaped or not; where there is none, as far as the name of an image goes.
    """
    if not rest:
        raise UsageError("/image: found no path, expected /image PATH or /image PATH QUESTION")
    if quoted := re.match(r"""(["'])(.+?)\1(?:\s+|$)""", rest):
        return _path(quoted[2]), rest[quoted.end() :].strip()
    ends = [len(rest), *(match.start() for match in reversed(list(re.finditer(r"\s+", rest))))]
    of_files = (end for end in ends if os.path.isfile(_path(rest[:end])))
    of_names = (end for end in ends if _IMAGE_NAME.search(rest[:end]))
    end = next(of_files, next(of_names, ends[-1]))
    return _path(rest[:end]), rest[end:].strip()


def _path(text: str) -> Path:
    return Path(re.sub(r"\\(.)", r"\1", text) if os.sep == "/" else text).expanduser()


def _read_line() -> str | None:
    """The next line that says something; None at the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line
