"""The oracle's error is counted by attribute, on clean images and on those out of a model's VAE."""

from types import SimpleNamespace

import pytest
import torch

from mm_interleaved.cli.main import run
from studies.__main__ import create_app
from studies.oracle_error import board_errors, oracle_errors


class PerfectDecoder:
    """In place of an image decoder: gives back what it is given, and greys a stripe if asked to."""

    def __init__(self, grey: slice | None = None):
        self.grey = grey

    def encode(self, pixels):
        return pixels

    def decode(self, pixels):
        pixels = pixels.clone()
        if self.grey is not None:
            pixels[..., self.grey, :] = 0.5
        return pixels


def holder(decoder):
    """What the measurement wants of a generator: a model that has a decoder and a device."""
    return SimpleNamespace(model=SimpleNamespace(image_decoder=decoder, device=torch.device("cpu")))


def test_images_that_come_back_as_they_were_are_read_as_well():
    clean, rebuilt = oracle_errors(holder(PerfectDecoder()), 6, seed=3).values()
    assert clean == rebuilt and clean.share_right == 1.0 and clean.wrong_images == 0
    assert clean.images == 6 and clean.total["place"] == 6 and clean.total["badge"] >= 6


def test_what_is_covered_is_counted_wrong():
    clean, rebuilt = oracle_errors(holder(PerfectDecoder(slice(0, 64))), 6, seed=3).values()
    assert clean.share_right == 1.0
    assert rebuilt.wrong["badge"] == rebuilt.total["badge"], "a figure that was missed has no badge"
    assert rebuilt.wrong_images == 6 and rebuilt.share_right < 0.5


def test_the_command_tells_both_of_the_shipped_model(capsys):
    assert run(["oracle", "--images", "4", "--device", "cpu"], create_app) == 0
    said = capsys.readouterr().out
    assert "clean: 100.000% of" in said and "VAE: 100.000% of" in said and "4 of 4 images wholly" in said


def test_cells_of_boards_are_counted_by_kind_and_scale():
    found = board_errors(holder(PerfectDecoder(slice(0, 64))), 6, seed=3, image_size=64)
    assert found["clean"].share_right == 1.0 and found["clean"].wrong_images == 0
    names = [name for name in found["VAE"].total if name.startswith("cells of a ")]
    assert names and found["VAE"].total == found["clean"].total
    # All cells of an even grey are read as the same value.
    assert (
        sum(found["VAE"].wrong[name] for name in names) > sum(found["VAE"].total[name] for name in names) / 2
    )


@pytest.mark.parametrize("size", ["64", "128"])
def test_the_command_tells_both_of_boards(size, capsys):
    assert (
        run(["oracle", "--boards", "--images", "2", "--image-size", size, "--device", "cpu"], create_app) == 0
    )
    said = capsys.readouterr().out
    assert "clean: 100.000% of" in said and "cells of a" in said
