"""What a trial learns from: pairs of images of one large quilt, the second to be painted from the first.

The latents of a trial are the means of blocks of four by four pixels, times two: they hold a large quilt's
patches exactly, so that no autoencoder has to be trained before.
Letters: I images, N attributes, y and x latent cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.recipes.storyworld.attribute_supervision import (
    IS_IMAGE_ONLY,
    NO_LABEL,
    NUM_VALUES,
    scene_labels,
)
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.detail.boards import (
    HEIGHTS,
    KINDS,
    Board,
    DetailScene,
    grid_of,
    hanging_positions,
)
from mm_interleaved.storyworld.detail.rendering import board_slices, render_detail
from mm_interleaved.storyworld.detail.scoring import cells_right, knowable_cells
from mm_interleaved.storyworld.stories import next_setting, placed_figures
from mm_interleaved.storyworld.tasks import random_edit
from mm_interleaved.storyworld.world import (
    ACTIONS,
    PLACES,
    SPLITS,
    TIMES,
    WEATHERS,
    Character,
    Figure,
    Scene,
    random_cast,
)

CELL = 4
"""Pixels of a latent cell's side."""
LATENT_SIZE = 16
_DOMAIN = 51
_SIDES = ("left", "right")
_POSITIONS = hanging_positions("large")
CODE_VALUES = (*NUM_VALUES, len(_POSITIONS), len(HEIGHTS), len(_POSITIONS), len(HEIGHTS))
"""Attributes of the scene, where its board hangs, and where it hung before."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and the one before it."""

    task: str
    before: DetailScene
    after: DetailScene

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns of latent cells from a place on the board to the same place before."""
        (left, top), (old_left, old_top) = self.after.board.corner, self.before.board.corner
        return (old_top - top) // CELL, (old_left - left) // CELL


@dataclass(frozen=True, slots=True)
class Examples:
    """Pairs as tensors."""

    pairs: tuple[Pair, ...]
    latents: Tensor
    """(I, 3, y, x): what is to be painted."""
    earlier: Tensor
    """(I, 3, 64, 64) in [0, 1]: what was before."""
    labels: Tensor
    """(I, N) int64: the code, which is blind to what the board, badges and patterns look like."""
    board: Tensor
    """(I, 1, y, x): 1 on the board."""

    def take(self, index_I: Tensor) -> "Examples":
        """Some of them."""
        pairs = tuple(self.pairs[i] for i in index_I.tolist())
        return Examples(
            pairs, self.latents[index_I], self.earlier[index_I], self.labels[index_I], self.board[index_I]
        )


def make_pair(split: str, seed: int, index: int, task: str) -> Pair:
    """One pair, a pure function of its arguments."""
    rng = SeededRandom(_DOMAIN, SPLITS.index(split), seed, index)
    character = random_cast(rng, split, 1)[0]
    scene = Scene(
        place=rng.pick(PLACES),
        time=rng.pick(TIMES),
        weather=rng.pick(WEATHERS),
        figures=(Figure(character=character, position=rng.pick(_SIDES), action=rng.pick(ACTIONS)),),
    )
    rows, columns = grid_of("quilt", 64)
    cells = tuple(rng.below(len(KINDS["quilt"].values)) for _ in range(rows * columns))
    before = DetailScene(scene=scene, board=_beside(rng, scene, cells))
    if task == "copy":
        return Pair(task, before, before)
    if task == "edit":
        return Pair(task, before, replace(before, scene=random_edit(rng, scene)[1]))
    return Pair(task, before, _moved(rng, before, character))


def _beside(rng: SeededRandom, scene: Scene, cells: tuple[int, ...]) -> Board:
    position = "right" if scene.figures[0].position == "left" else "left"
    return Board(kind="quilt", scale="large", position=position, height=rng.pick(HEIGHTS), cells=cells)


def _moved(rng: SeededRandom, before: DetailScene, character: Character) -> DetailScene:
    """The next panel of a story: the board on either side, at any height."""
    scene = next_setting(rng, before.scene)
    figures = placed_figures(rng, [character], before.scene)
    scene = replace(scene, figures=(replace(figures[0], position=rng.pick(_SIDES)),))
    return DetailScene(scene=scene, board=_beside(rng, scene, before.board.cells))


def examples(split: str, seed: int, first: int, count: int, tasks: Sequence[str]) -> Examples:
    """Pairs number `first` and on, one task after the other."""
    pairs = tuple(make_pair(split, seed, first + i, tasks[i % len(tasks)]) for i in range(count))
    before, after = (
        torch.from_numpy(np.stack([render_detail(scene) for scene in scenes])).permute(0, 3, 1, 2).float()
        / 255
        for scenes in ([pair.before for pair in pairs], [pair.after for pair in pairs])
    )
    board = torch.zeros(count, 1, LATENT_SIZE, LATENT_SIZE)
    for row, pair in zip(board, pairs, strict=True):
        rows, columns = (slice(s.start // CELL, s.stop // CELL) for s in board_slices(pair.after.board))
        row[:, rows, columns] = 1
    labels = torch.tensor([_code(pair) for pair in pairs])
    return Examples(pairs, latents_of(after), before, labels, board)


def _code(pair: Pair) -> list[int]:
    labels = torch.tensor(scene_labels(pair.after.scene)).masked_fill(IS_IMAGE_ONLY, NO_LABEL).tolist()
    for detail in (pair.after, pair.before):
        labels += [_POSITIONS.index(detail.board.position), HEIGHTS.index(detail.board.height)]
    return labels


def latents_of(pixels_I3HW: Tensor) -> Tensor:
    """Latents (I, 3, y, x) of images in [0, 1]."""
    return 2 * F.avg_pool2d(2 * pixels_I3HW - 1, CELL)


def pixels_of(latents_I3yx: Tensor) -> np.ndarray:
    """(I, 64, 64, 3) uint8: each latent cell an even block."""
    levels = ((latents_I3yx / 2 + 1) / 2).clamp(0, 1) * 255 + 0.5
    blocks = levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return blocks.repeat(CELL, axis=1).repeat(CELL, axis=2)


def right_patches(latents_I3yx: Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    """Share of the patches that latents have right, of those that both images show, by task."""
    found: dict[str, list[float]] = {}
    for pixels, pair in zip(pixels_of(latents_I3yx), pairs, strict=True):
        counts = knowable_cells(pair.after, [pair.before])
        found.setdefault(pair.task, []).extend(cells_right(pixels, pair.after)[counts].tolist())
    return {task: sum(values) / len(values) for task, values in found.items()}
