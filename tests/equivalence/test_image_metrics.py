"""Distances of sets of images and similarities, with an extractor whose features are plain to see."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from mm_interleaved.errors import ModelFileError, UsageError
from mm_interleaved.evaluation.extractors import ClipEmbedder, InceptionFeatures
from mm_interleaved.evaluation.metrics.images import (
    clip_score,
    distribution_distances,
    image_similarity,
    released_pixels,
)


class MeanColour(nn.Module):
    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def noise(seed, count=64, shift=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 200, (count, 3, 8, 8), generator=generator) + shift).to(torch.uint8)


def frechet(first, second):
    """By the formula: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64."""
    means = [side.mean(0) for side in (first, second)]
    covariances = [np.cov(side, rowvar=False) for side in (first, second)]
    roots = np.linalg.eigvals(covariances[0] @ covariances[1])
    trace = np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(roots.astype(complex)).real.sum()
    return ((means[0] - means[1]) ** 2).sum() + trace


def test_distances_are_those_of_the_formula():
    pytest.importorskip("torchmetrics")
    real, generated = noise(0), noise(1, shift=40)
    found = distribution_distances([real[:40], real[40:]], [generated], MeanColour(), kid_subset=32)
    features = [MeanColour()(side).double().numpy() for side in (real, generated)]
    assert found["fid"] == pytest.approx(frechet(*features), rel=1e-6)
    assert found["kid"] > 0
    same = distribution_distances([real], [real], MeanColour())
    assert same["fid"] == pytest.approx(0, abs=1e-8) and abs(same["kid"]) < 1e-3
    assert distribution_distances([real], [generated], MeanColour(), kid_subset=32) == found
    with pytest.raises(ValueError, match="64 real and 1 generated"):
        distribution_distances([real], [generated[:1]], MeanColour())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(UsageError, match=r"mm-interleaved\[eval\]"):
        distribution_distances([], [], MeanColour())


def test_the_released_size_is_64_pixels():
    images = torch.zeros(2, 3, 100, 200, dtype=torch.uint8)
    images[..., 50:150] = 255
    small = released_pixels(images)
    assert (
        small.shape == (2, 3, 64, 64) and small.dtype == torch.uint8 and bool((small[..., 2:-2] == 255).all())
    )
    assert released_pixels(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 3, 64, 64)


def test_similarities():
    axes = np.eye(3)
    assert clip_score(axes, axes) == 100 and clip_score(axes, -axes) == 0
    assert image_similarity(axes, axes[[0, 2, 1]]) == pytest.approx(1 / 3)


def test_extractors_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ModelFileError, match="is no file; FID needs its weights"):
        InceptionFeatures(tmp_path / "inception.pt")
    (tmp_path / "inception.pt").write_bytes(b"no module")
    with pytest.raises(ModelFileError, match="is no TorchScript module"):
        InceptionFeatures(tmp_path / "inception.pt")
    with pytest.raises(ModelFileError, match=r"clip: .*cannot be loaded"):
        ClipEmbedder(tmp_path / "nowhere")
