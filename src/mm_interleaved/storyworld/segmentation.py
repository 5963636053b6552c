"""Maps of what each pixel shows: one colour for each class.

Classes: sky, ground, backdrop (what stands on the horizon), the species, the kinds of props.
"""

import numpy as np

from mm_interleaved.storyworld import sprites
from mm_interleaved.storyworld.backgrounds import land_mask
from mm_interleaved.storyworld.renderer import POSITION_X, figure_slots
from mm_interleaved.storyworld.world import PROPS, SPECIES, Scene

CLASSES = ("sky", "ground", "backdrop", *SPECIES, *PROPS)
# Far apart from each other: the nearest two differ by 64 in one channel at least.
CLASS_RGB = np.array(
    [
        (128, 192, 255), (96, 64, 32), (0, 96, 64),
        (255, 0, 0), (255, 128, 0), (255, 255, 0), (128, 255, 0),
        (0, 255, 128), (0, 255, 255), (0, 64, 255), (160, 0, 255),
        (255, 0, 192), (255, 160, 160), (255, 255, 255), (128, 128, 128), (0, 0, 0), (128, 0, 64),
    ],
    np.uint8,
)  # fmt: skip


def class_map(scene: Scene) -> np.ndarray:
    """(64, 64) uint8: the index in CLASSES of each pixel. Shadows, notes and letters z do not count."""
    classes = land_mask(scene.place).copy()
    for figure in scene.figures:
        left = POSITION_X[figure.position] - sprites.FIGURE_CENTRE
        region = classes[: sprites.FIGURE_ROWS, left : left + sprites.FIGURE_COLUMNS]
        region[sprites.without_mark(figure_slots(figure), figure.action)] = CLASSES.index(
            figure.character.species
        )
    for prop in scene.props:
        left = POSITION_X[prop.position] - sprites.PROP_COLUMNS // 2
        region = classes[
            sprites.PROP_TOP : sprites.PROP_TOP + sprites.PROP_ROWS, left : left + sprites.PROP_COLUMNS
        ]
        region[sprites.prop_sprite(prop.kind) != sprites.TRANSPARENT] = CLASSES.index(prop.kind)
    return classes


def render_map(scene: Scene) -> np.ndarray:
    """(64, 64, 3) uint8: the class map in colours."""
    return CLASS_RGB[class_map(scene)]


def mean_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two class maps, averaged over the classes in either, 0 to 1."""
    scores = []
    for index in np.union1d(found, truth):
        of_found, of_truth = found == index, truth == index
        scores.append((of_found & of_truth).sum() / (of_found | of_truth).sum())
    return float(np.mean(scores))
