"""Tasks about boards, as documents with a hole (see `storyworld.tasks`).

`meta` holds what other tasks' has; each of its scenes has a "board" beside the rest, and `image_size` says
how large its images are. What an image's board shows never stands in a text: it is in an earlier image.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.detail.boards import (
    IMAGE_SIZES,
    KINDS,
    Board,
    DetailScene,
    describe_board,
    detail_to_record,
    random_detail_scene,
    random_hanging,
)
from mm_interleaved.storyworld.detail.rendering import board_slices, enlarged, render_detail, visible_cells
from mm_interleaved.storyworld.language import describe_scene, tell_panel
from mm_interleaved.storyworld.segmentation import render_map
from mm_interleaved.storyworld.stories import next_setting, placed_figures
from mm_interleaved.storyworld.task_documents import document_with_hole, shows_held_out
from mm_interleaved.storyworld.tasks import random_edit
from mm_interleaved.storyworld.world import (
    SPLITS,
    Scene,
    random_cast,
)

_DETAIL_DOMAIN = 4
BOARD_RGB = (192, 64, 192)
"""A board's colour in a map of classes, which has no other like it."""
COPY_PROMPT = "The same scene."


def detail_document(split: str, seed: int, index: int, task: str, image_size: int = 64) -> Document:
    """One document, a pure function of its arguments.

    Args:
        split: "train", "validation" or "test", see `tasks.document`.
        seed, index: integers from 0.
        task: a name out of DETAIL_TASKS.
        image_size: of all its images, 64 or 128.

    Raises:
        ValueError: one of these is none of what it may be.
    """
    _check("split", split, SPLITS)
    _check("task", task, tuple(DETAIL_TASKS))
    _check("image_size", image_size, IMAGE_SIZES)
    rng = SeededRandom(
        _DETAIL_DOMAIN, SPLITS.index(split), seed, index, tuple(DETAIL_TASKS).index(task), image_size
    )
    made = DETAIL_TASKS[task](rng, split, image_size)
    meta: dict[str, Any] = {"task": task, "split": split, "seed": seed, "index": index}
    meta |= {"image_size": image_size, **made.meta}
    meta["is_held_out"] = shows_held_out(meta["scenes"])
    return replace(made, id=f"storyworld-{task}-{image_size}-{split}-{seed}-{index}", meta=meta)


def _check(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, found {value!r}")


def _document(
    parts: Sequence[Part], target: Sequence[Part], scenes: Sequence[DetailScene], **more: Any
) -> Document:
    return document_with_hole(parts, target, [detail_to_record(scene) for scene in scenes], **more)


def detail_image(detail: DetailScene, role: str | None = None) -> Image:
    """The scene's image as a part."""
    return Image(PILImage.fromarray(render_detail(detail)), role=role)


def detail_map(detail: DetailScene) -> np.ndarray:
    """(S, S, 3) uint8: the map of classes in colours, the board behind figures and props."""
    scene, board = detail.scene, detail.board
    with_things, bare = render_map(scene), render_map(replace(scene, figures=(), props=()))
    factor = render_detail(detail).shape[0] // with_things.shape[0]
    pixels = enlarged(bare, factor)
    pixels[board_slices(board)] = BOARD_RGB
    is_thing = enlarged((with_things != bare).any(2), factor)
    pixels[is_thing] = enlarged(with_things, factor)[is_thing]
    return pixels


def _random(rng: SeededRandom, split: str, image_size: int) -> DetailScene:
    return random_detail_scene(rng, random_cast(rng, split, 1)[0], image_size)


def _copy(rng: SeededRandom, split: str, image_size: int) -> Document:
    """The same image again: what an image decoder that looks at earlier images learns first."""
    detail = _random(rng, split, image_size)
    return _document((detail_image(detail), Text(COPY_PROMPT)), (detail_image(detail),), [detail, detail])


def _vqa(rng: SeededRandom, split: str, image_size: int) -> Document:
    """What one cell shows that nothing hides."""
    detail = _random(rng, split, image_size)
    question, answer = ask_cell(rng, detail)
    return _document(
        (detail_image(detail, "user"), Text(question, role="user")),
        (Text(answer, role="assistant"),),
        [detail],
        question=question,
        question_kind=detail.board.kind,
        is_fine_detail=True,
    )


def ask_cell(rng: SeededRandom, detail: DetailScene) -> tuple[str, str]:
    """A question about one cell of the board that nothing hides, and its answer."""
    board, kind = detail.board, KINDS[detail.board.kind]
    cell = rng.pick(np.flatnonzero(visible_cells(detail)).tolist())
    row, column = divmod(cell, board.grid[1])
    question = f"Which {kind.cell} is in row {row + 1}, column {column + 1} of the {board.kind}?"
    return question, kind.values[board.cells[cell]]


def _edit(rng: SeededRandom, split: str, image_size: int) -> Document:
    """An image and an instruction; the image after it, with the same board."""
    before = _random(rng, split, image_size)
    instruction, scene = random_edit(rng, before.scene)
    after = replace(before, scene=scene)
    return _document((detail_image(before), Text(instruction)), (detail_image(after),), [before, after])


def _segmentation(rng: SeededRandom, split: str, image_size: int) -> Document:
    """An image of a place, and the map of another one of it; that other image, with the same board."""
    before = _random(rng, split, image_size)
    after = _random(rng, split, image_size)
    board = _hung(before.board, after.board.scale, after.board.position, after.board.height)
    after = DetailScene(scene=replace(after.scene, place=before.scene.place), board=board)
    text = Text(f"{describe_scene(after.scene)} {describe_board(board, is_known=True)}")
    given = (detail_image(before), Image(PILImage.fromarray(detail_map(after))), text)
    # The truth of the map stands for what it is a map of.
    return _document(given, (detail_image(after),), [before, after, after])


def _story(rng: SeededRandom, split: str, image_size: int) -> Document:
    """The first panel is given; texts and images of all others are to be made."""
    return _story_document(rng, split, image_size, lambda num_parts: 2)


def _story_last(rng: SeededRandom, split: str, image_size: int) -> Document:
    """Everything is given but the last image."""
    return _story_document(rng, split, image_size, lambda num_parts: num_parts - 1)


def _story_document(
    rng: SeededRandom, split: str, image_size: int, num_given: Callable[[int], int]
) -> Document:
    """Somebody and a board, which hangs elsewhere, larger or smaller, in each of two to four panels."""
    character = random_cast(rng, split, 1)[0]
    first = random_detail_scene(rng, character, image_size)
    details = [replace(first, scene=replace(first.scene, props=()))]
    for _ in range(rng.weighted((1, 2, 3), (40, 40, 20))):
        details.append(_next_panel(rng, details[-1]))
    parts: list[Part] = []
    previous: Scene | None = None
    for detail in details:
        known = {} if previous is None else {character.name: character}
        told = tell_panel(rng, detail.scene, previous, known, set())
        board = describe_board(detail.board, is_known=previous is not None)
        parts += [Text(f"{told} {board}"), detail_image(detail)]
        previous = detail.scene
    given = num_given(len(parts))
    return _document(parts[:given], parts[given:], details)


def _next_panel(rng: SeededRandom, previous: DetailScene) -> DetailScene:
    character = previous.scene.figures[0].character
    scene = replace(
        next_setting(rng, previous.scene), figures=placed_figures(rng, [character], previous.scene)
    )
    return DetailScene(
        scene=scene, board=_hung(previous.board, *random_hanging(rng, scene.figures[0].position))
    )


def _hung(board: Board, scale: str, position: str, height: str) -> Board:
    """The same board elsewhere."""
    return replace(board, scale=scale, position=position, height=height)


DETAIL_TASKS: dict[str, Callable[[SeededRandom, str, int], Document]] = {
    "detail_copy": _copy,
    "detail_vqa": _vqa,
    "detail_edit": _edit,
    "detail_segmentation": _segmentation,
    "detail_story": _story,
    "detail_story_last": _story_last,
}
"""Beside the tasks of `storyworld.tasks`, never in the round of these."""
