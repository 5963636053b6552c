"""`caption`, `vqa`, `ground`, `draw`, `story`: documents with a ready prompt, for the same engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_interleaved.cli.command import Flags, command
from mm_interleaved.cli.generate import (
    checked_file,
    checked_text,
    default_output,
    typed_document,
    typed_parts,
)
from mm_interleaved.cli.options import BatchSize, Device, Dtype, Images, Model, NewRun, Output, Texts
from mm_interleaved.cli.output import say, say_error
from mm_interleaved.cli.places import image_to_write
from mm_interleaved.cli.report import SOME_FAILED, run_and_report
from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.images import FORMAT_NAMES
from mm_interleaved.errors import InputError, MMInterleavedError, UsageError
from mm_interleaved.tokens.boxes import BOX_RANGE, read_box
from mm_interleaved.tokens.task_prompts import CAPTION_PROMPT, GROUND_PROMPT

if TYPE_CHECKING:
    from mm_interleaved.runs.generate import RunRequest

ImagePath = Annotated[Path, typer.Argument(metavar="IMAGE", help=f"An image: {FORMAT_NAMES}.")]


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (caption, vqa, ground, draw, story):
        command(app, panel="Ready prompts")(function)


def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help=f"Images: {FORMAT_NAMES}.")],
    prompt: Annotated[str, typer.Option(help="What is asked of the model.")] = CAPTION_PROMPT,
    model: Model = "storyworld",
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Describe images, one line each. One that cannot be read fails alone, and the command ends with 7."""
    documents = [_question(path, prompt, "--prompt") for path in images]
    answers = _answers(documents, model, device, dtype, flags, batch_size)
    num_failed = 0
    for path, answer in zip(images, answers, strict=True):
        if isinstance(answer, MMInterleavedError):
            if len(images) == 1:
                raise answer
            num_failed += 1
            say_error(str(answer))
        else:
            say(f"{path}: {answer}" if len(images) > 1 else answer)
    return SOME_FAILED if num_failed else 0


def vqa(
    image: ImagePath,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="A question about the image.")],
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
):
    """Answer a question about an image."""
    answer = _answer(_question(image, question, "QUESTION"), model, device, dtype, flags)
    say(answer)


def ground(
    image: ImagePath,
    phrase: Annotated[str, typer.Argument(metavar="PHRASE", help="What to look for: red ball.")],
    prompt: Annotated[str, typer.Option(help="The question; {phrase} stands for PHRASE.")] = GROUND_PROMPT,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File for the image with the box drawn.",
            metavar="PNG",
            callback=image_to_write,
        ),
    ] = None,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Find a thing in an image: left, top, right, bottom in pixels."""
    question = prompt.replace("{phrase}", checked_text(phrase, "PHRASE"))
    document = _question(image, question, "--prompt")
    answer = _answer(document, model, device, dtype, flags)
    pixels = document.images[0].load()
    box = box_in_pixels(answer, pixels.size)
    if box is None:
        say(f"no box in the answer {answer!r}")
        return SOME_FAILED
    say(" ".join(map(str, box)))
    if output is not None:
        _draw_box(pixels, box, output)
    return 0


def draw(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the image shows.")],
    output: Output = None,
    model: Model = "storyworld",
    new_run: NewRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Generate an image of a text."""
    # The seed of a document follows from its id: another word here would be another image.
    documents = [typed_document("picture", [Text(checked_text(prompt, "PROMPT"))], layout="I")]
    output = output or default_output("picture", documents, model, flags)
    return run_and_report(_request(documents, output, model, device, dtype, flags, new_run))


def story(
    context: typer.Context,
    opening: Annotated[
        str | None, typer.Argument(metavar="OPENING", help="The first sentence; or use --text and --image.")
    ] = None,
    panels: Annotated[int, typer.Option(min=1, max=64, help="Images in the whole story.")] = 4,
    output: Output = None,
    text: Texts = None,
    image: Images = None,
    model: Model = "storyworld",
    new_run: NewRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    *,
    flags: Flags,
) -> int:
    """Continue a story from its opening; without one, StoryWorld gives the first panel (by --seed)."""
    parts: list[Part] = [] if opening is None else [Text(checked_text(opening, "OPENING"))]
    parts += typed_parts(context, text, image)
    parts = parts or _storyworld_opening(int(flags.get("seed", 0)))
    documents = [typed_document("story", parts, layout=story_layout(parts, panels))]
    output = output or default_output("story", documents, model, flags)
    return run_and_report(_request(documents, output, model, device, dtype, flags, new_run))


def _request(
    documents: list[Document],
    output: Path,
    model: str,
    device: str,
    dtype: str,
    flags: Flags,
    new_run: bool,
) -> RunRequest:
    from mm_interleaved.runs.engine import ModelChoice
    from mm_interleaved.runs.generate import RunRequest

    choice = ModelChoice(name=model, device=device, dtype=dtype)
    return RunRequest(documents=documents, output=output, model=choice, flags=flags, new_run=new_run)


def story_layout(parts: list[Part], num_panels: int) -> str:
    """The layout that brings a story of texts and images to `num_panels` images."""
    missing = num_panels - sum(isinstance(part, Image) for part in parts)
    if missing < 1:
        raise UsageError(f"--panels {num_panels}: the opening already has that many images", field="panels")
    begins_with_image = isinstance(parts[-1], Text)
    letters = ["I", *["T", "I"] * (missing - 1)] if begins_with_image else ["T", "I"] * missing
    return " ".join(letters)


def box_in_pixels(answer: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of an answer such as `(102,355)(480,910)`, which counts thousandths of the model's square view.

    Args:
        size: width and height of the image in pixels; the model was given its central square.
    """
    found = read_box(answer)
    if found is None:
        return None
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    x0, y0, x1, y1 = (round(min(edge, BOX_RANGE) * side / BOX_RANGE) for edge in found)
    return left + x0, top + y0, left + x1, top + y1


def _question(path: Path, question: str, name: str) -> Document:
    """An image and what is asked about it; `name` is the argument that asks."""
    image = Image(checked_file(path, "IMAGE"), role="user", name=str(path))
    asked = Text(checked_text(question, name), role="user")
    return Document(id=str(path), parts=(image, asked), layout="T")


def _answer(document: Document, model: str, device: str, dtype: str, flags: Mapping[str, Any]) -> str:
    """The answer to the only question. Raises what was wrong with it."""
    [answer] = _answers([document], model, device, dtype, flags)
    if isinstance(answer, MMInterleavedError):
        raise answer
    return answer


def _answers(
    documents: list[Document],
    model: str,
    device: str,
    dtype: str,
    flags: Mapping[str, Any],
    batch_size: int | None = None,
) -> Iterator[str | MMInterleavedError]:
    """The answer to each question, in order, as batches of them are done; or what was wrong with it."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.generation.defaults import generation_defaults
    from mm_interleaved.generation.settings import settings_for
    from mm_interleaved.model_files.config import read_config
    from mm_interleaved.model_files.resolve import find_model
    from mm_interleaved.runs.engine import continue_in_batches

    folder = find_model(model)
    defaults = generation_defaults(read_config(folder))
    settings = [settings_for(document, defaults, flags) for document in documents]
    # Before a model is read for them.
    answers: dict[int, str | MMInterleavedError] = _unreadable(documents)
    asked = [place for place in range(len(documents)) if place not in answers]
    num_yielded = 0
    if asked:
        generator = load_quietly(folder, device=device, dtype=dtype)
        questions = [documents[place] for place in asked]
        events = continue_in_batches(generator, questions, [settings[place] for place in asked], batch_size)
        for number, event in events:
            answer = _outcome(event, len(questions[number].parts))
            if answer is not None:
                answers[asked[number]] = answer
            while num_yielded in answers:
                yield answers[num_yielded]
                num_yielded += 1
    yield from (answers[place] for place in range(num_yielded, len(documents)))


def _unreadable(documents: list[Document]) -> dict[int, Any]:
    """What is wrong with those that have an image which cannot be read, by place."""
    errors = {}
    for place, document in enumerate(documents):
        try:
            for image in document.images:
                image.load()
        except InputError as error:
            errors[place] = error
    return errors


def _outcome(event: Any, num_given: int) -> str | MMInterleavedError | None:
    """The generated text of a document that is finished, or its error; None before its end."""
    from mm_interleaved.generation.events import Failed, Finished

    match event:
        case Finished(document=completed):
            texts = [part.text for part in completed.parts[num_given:] if isinstance(part, Text)]
            return " ".join(texts).strip()
        case Failed(error=error):
            return error
        case _:
            return None


def _storyworld_opening(seed: int) -> list[Part]:
    from mm_interleaved.storyworld.tasks import document

    return list(document("test", seed, 0, "story").parts)


def _draw_box(image: Any, box: tuple[int, int, int, int], path: Path):
    from PIL import ImageDraw

    from mm_interleaved.documents.images import to_png
    from mm_interleaved.files import make_folder, write_file

    make_folder(path.parent)
    marked = image.copy()
    ImageDraw.Draw(marked).rectangle(box, outline=(255, 60, 40), width=max(1, min(marked.size) // 100))
    write_file(path, to_png(marked))
