"""Maps of classes against each other: mean intersection over union (ADE20K, 150 classes)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def confusion(
    found: np.ndarray, truth: np.ndarray, num_classes: int, ignored: int | None = None
) -> np.ndarray:
    """How many cells of each class were found to be which: (num_classes, num_classes) int64, rows = truth.

    Args:
        found, truth: integer maps of one shape; classes from 0. What lies outside of the classes in `found`
            counts as none of them.
        ignored: a value of `truth` that does not count.

    Raises:
        ValueError: shapes differ, or `truth` holds what is no class.
    """
    if found.shape != truth.shape:
        raise ValueError(f"maps: found shape {found.shape}, expected {truth.shape}")
    counts = truth != ignored if ignored is not None else np.ones(truth.shape, bool)
    meant, said = truth[counts].astype(np.int64), found[counts].astype(np.int64)
    if meant.size and not (meant.min() >= 0 and meant.max() < num_classes):
        raise ValueError(f"truth: found class {int(meant.max())}, expected 0 to {num_classes - 1}")
    # One more column for what is no class.
    said = np.where((said >= 0) & (said < num_classes), said, num_classes)
    pairs = np.bincount(meant * (num_classes + 1) + said, minlength=num_classes * (num_classes + 1))
    return pairs.reshape(num_classes, num_classes + 1)


def mean_iou(confusions: Iterable[np.ndarray]) -> float:
    """Intersection over union of all cells together, averaged over the classes that occur in the truth.

    Args:
        confusions: results of `confusion`, one a map.
    """
    total = sum(confusions, start=np.zeros((), np.int64))
    if total.ndim != 2:
        raise ValueError("confusions: found none")
    classes = len(total)
    right = np.diag(total[:, :classes])
    meant, said = total.sum(1), total[:, :classes].sum(0)
    occurs = meant > 0
    union = meant + said - right
    return float(np.mean(right[occurs] / union[occurs])) if occurs.any() else 0.0
