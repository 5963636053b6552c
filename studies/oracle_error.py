"""How often the oracle errs: on clean images, and on those that went through a model's VAE and back.

What a model generates comes out of its VAE, so the second is the error that a score of generated images has
at least. Images are taken in turn from the train and the test split.
Letters: B images, H by W pixels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.storyworld.detail.boards import DetailScene, random_detail_scene
from mm_interleaved.storyworld.detail.reading import read_detail
from mm_interleaved.storyworld.detail.rendering import render_detail, visible_cells
from mm_interleaved.storyworld.detail.scoring import cells_right
from mm_interleaved.storyworld.oracle import (
    FIGURE_ATTRIBUTES,
    SETTING_ATTRIBUTES,
    Reading,
    attribute_matches,
    read_scene,
)
from mm_interleaved.storyworld.renderer import render_scene, scene_at
from mm_interleaved.storyworld.world import Scene, random_cast

SPLITS = ("train", "test")
_BATCH = 16
_BOARD_DOMAIN = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleError:
    """What was read, of images of one kind."""

    images: int
    wrong_images: int
    """Images of which anything was read wrong."""
    total: Counter[str]
    """How often each attribute was asked."""
    wrong: Counter[str]
    """How often it was read wrong."""

    @property
    def share_right(self) -> float:
        """Of all attributes."""
        return 1.0 - self.wrong.total() / self.total.total()


def oracle_errors(generator: InterleavedGenerator, images: int, seed: int) -> dict[str, OracleError]:
    """Errors by kind of image: "clean", and "VAE", encoded and decoded by the model's."""
    scenes = [scene_at(SPLITS[index % 2], seed, index // 2) for index in range(images)]
    clean = [render_scene(scene) for scene in scenes]
    return {
        "clean": _errors(clean, scenes),
        "VAE": _errors(_rebuilt(generator, clean), scenes),
    }


def _errors(images: Iterable[np.ndarray], scenes: list[Scene]) -> OracleError:
    total, wrong, wrong_images = Counter[str](), Counter[str](), 0
    for pixels_HW3, scene in zip(images, scenes, strict=True):
        missed = Counter[str]()
        for name, is_right in _comparisons(read_scene(pixels_HW3), scene):
            total[name] += 1
            missed[name] += not is_right
        wrong += missed
        wrong_images += missed.total() > 0
    return OracleError(images=len(scenes), wrong_images=wrong_images, total=total, wrong=wrong)


def _comparisons(reading: Reading, truth: Scene) -> Iterator[tuple[str, bool]]:
    """Each attribute of a scene, and whether it was read right; a figure that was missed has none right."""
    for name in SETTING_ATTRIBUTES:
        yield name, getattr(reading, name) == getattr(truth, name)
    stands = {figure.position for figure in truth.figures}
    yield "positions", {figure.position for figure in reading.figures} == stands
    yield "props", set(reading.props) == set(truth.props)
    for figure in truth.figures:
        found = reading.figure_at(figure.position)
        for name in FIGURE_ATTRIBUTES:
            wanted = figure.action if name == "action" else getattr(figure.character, name)
            yield name, getattr(found, name, None) == wanted


def board_errors(
    generator: InterleavedGenerator, images: int, seed: int, image_size: int
) -> dict[str, OracleError]:
    """The same of scenes with boards: every cell that nothing hides, by kind and scale of its board, where
    the board hangs, and all attributes of the rest together.
    """
    details = list(_random_details(images, seed, image_size))
    clean = [render_detail(detail) for detail in details]
    return {
        "clean": _board_errors(clean, details),
        "VAE": _board_errors(_rebuilt(generator, clean), details),
    }


def _random_details(images: int, seed: int, image_size: int) -> Iterator[DetailScene]:
    for index in range(images):
        split = SPLITS[index % 2]
        rng = SeededRandom(_BOARD_DOMAIN, seed, index)
        yield random_detail_scene(rng, random_cast(rng, split, 1)[0], image_size)


def _board_errors(images: Iterable[np.ndarray], details: list[DetailScene]) -> OracleError:
    total, wrong, wrong_images = Counter[str](), Counter[str](), 0
    for pixels_HW3, detail in zip(images, details, strict=True):
        missed = Counter[str]()
        found = read_detail(pixels_HW3)
        board, truth = found.board, detail.board
        is_right = cells_right(pixels_HW3, detail)[visible_cells(detail)]
        matches = attribute_matches(found.reading, detail.scene, badges=True)
        hanging = replace(board, cells=()) == replace(truth, cells=())
        for name, values in (
            (f"cells of a {truth.scale} {truth.kind}", is_right.tolist()),
            ("where a board hangs", [hanging]),
            ("other attributes", matches),
        ):
            total[name] += len(values)
            missed[name] += len(values) - sum(values)
        wrong += missed
        wrong_images += missed.total() > 0
    return OracleError(images=len(details), wrong_images=wrong_images, total=total, wrong=wrong)


@torch.no_grad()
def _rebuilt(generator: InterleavedGenerator, images: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Each image as the VAE reconstructs it, (H, W, 3) of whole levels as a generated one."""
    decoder, device = generator.model.image_decoder, generator.model.device
    for first in range(0, len(images), _BATCH):
        pixels_BHW3 = np.stack(images[first : first + _BATCH])
        pixels_B3HW = torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).to(device, torch.float32) / 255
        decoded_B3HW = decoder.decode(decoder.encode(pixels_B3HW)).float()
        levels_BHW3 = (decoded_B3HW * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
        yield from levels_BHW3.cpu().numpy()
