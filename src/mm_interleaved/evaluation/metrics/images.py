"""Generated images against real ones, and against the texts they were generated from.

FID (arXiv 1706.08500) and KID (arXiv 1801.01401) by torchmetrics (extra `eval`), on the features of an
extractor that is given (`evaluation.extractors`); similarities are cosines of unit embeddings.
Letters: N images, D feature channels, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.errors import UsageError

RELEASED_SIZE = 64
"""Pixels a side to which the released evaluation shrinks both sides before Inception sees them, by a default
that was never overridden: its numbers compare with nobody else's."""


def distribution_distances(
    real: Iterable[Tensor], generated: Iterable[Tensor], extractor: nn.Module, *, kid_subset: int = 1000
) -> dict[str, float]:
    """`fid`, and `kid` (mean over subsets) of two sets of images.

    Args:
        real, generated: batches (N, 3, H, W) uint8, read once.
        extractor: (N, 3, H, W) uint8 → (N, D), with the attribute `num_features`.
        kid_subset: images a subset; at most as many as either side has.

    Raises:
        ValueError: fewer than two images on a side.
        UsageError: torchmetrics is not installed.
    """
    fid_class, kid_class = _torchmetrics()
    sides = [_features(batches, extractor) for batches in (real, generated)]
    if min(map(len, sides)) < 2:
        raise ValueError(
            f"found {len(sides[0])} real and {len(sides[1])} generated images, expected two of each"
        )
    # The features are counted once; torchmetrics gets them through an extractor that hands them on.
    fid = fid_class(feature=_Given(sides[0].shape[1]))
    kid = kid_class(
        feature=_Given(sides[0].shape[1]), subsets=50, subset_size=min(kid_subset, *map(len, sides))
    )
    for features, is_real in zip(sides, (True, False), strict=True):
        fid.update(features, real=is_real)
        kid.update(features, real=is_real)
    with torch.random.fork_rng(devices=[]):
        # The subsets are drawn by torch's global generator.
        torch.manual_seed(0)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


def released_pixels(images: Tensor) -> Tensor:
    """What the released evaluation compares: shorter side 64, centre cropped; (N, 3, 64, 64) uint8."""
    height, width = images.shape[-2:]
    scale = RELEASED_SIZE / min(height, width)
    size = (max(RELEASED_SIZE, round(height * scale)), max(RELEASED_SIZE, round(width * scale)))
    small = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - RELEASED_SIZE) // 2, (size[1] - RELEASED_SIZE) // 2
    cropped = small[..., top : top + RELEASED_SIZE, left : left + RELEASED_SIZE]
    return cropped.round().clamp(0, 255).to(torch.uint8)


def clip_score(text_ND: np.ndarray, image_ND: np.ndarray) -> float:
    """100 * mean of max(0, cosine) of texts and images (arXiv 2104.08718, without its factor 2.5)."""
    return float(100 * np.maximum(0, np.einsum("nd,nd->n", text_ND, image_ND)).mean())


def image_similarity(first_ND: np.ndarray, second_ND: np.ndarray) -> float:
    """Mean cosine of generated images with the real ones in their places (CLIP-I), -1 to 1."""
    return float(np.einsum("nd,nd->n", first_ND, second_ND).mean())


class _Given(nn.Module):
    """An extractor for features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def _features(batches: Iterable[Tensor], extractor: nn.Module) -> Tensor:
    found = [extractor(batch).flatten(1).double() for batch in batches]
    return torch.cat(found) if found else torch.zeros(0, 1)


def _torchmetrics() -> tuple[Any, Any]:
    """The classes of FID and KID, which the package's index hides where torch-fidelity is missing."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise UsageError("FID and KID need torchmetrics: pip install 'mm-interleaved[eval]'") from error
    return FrechetInceptionDistance, KernelInceptionDistance
