"""What an image may be given as in Python, and what is refused in one sentence."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Image
from mm_interleaved.errors import ImageError

PIXELS = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)


def png(pixels=PIXELS):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    # Left at its end, as whoever has just written it leaves it.
    return buffer


DATA = png().getvalue()
GIVEN = {
    "picture": PILImage.fromarray(PIXELS),
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "memoryview": memoryview(DATA),
    "BytesIO": png(),
    "BufferedReader": io.BufferedReader(io.BytesIO(DATA)),
    "data URL": "data:image/png;base64," + base64.b64encode(DATA).decode(),
    "array": PIXELS,
    "array seen from behind": PIXELS[::-1][::-1],
    "array with alpha": np.dstack([PIXELS, np.full((9, 7, 1), 255, np.uint8)]),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_whatever_holds_an_image_gives_its_pixels(kind):
    assert np.array_equal(np.asarray(Image(GIVEN[kind]).load()), PIXELS)


def test_paths_are_read_when_they_are_wanted_in_any_spelling(tmp_path):
    path = tmp_path / "a.png"
    images = [Image(path), Image(str(path))]
    path.write_bytes(DATA)
    assert all(np.array_equal(np.asarray(image.load()), PIXELS) for image in images)


def test_grey_arrays_are_grey_and_later_changes_of_an_array_change_nothing():
    grey = PIXELS[..., 0].copy()
    images = [Image(grey), Image(grey[..., None])]
    expected = np.repeat(grey[..., None], 3, axis=2)
    grey[:] = 0
    assert all(np.array_equal(np.asarray(image.load()), expected) for image in images)


@pytest.mark.parametrize(
    "given, found",
    [
        (None, "found NoneType"),
        (5, "found int"),
        ([PIXELS], "found list"),
        ({"path": "a.png"}, "found dict"),
        (torch.zeros(3, 4, 4), r"found Tensor of torch\.float32 with shape \(3, 4, 4\)"),
        (PIXELS / 255, r"found ndarray of float64 with shape \(9, 7, 3\)"),
        (PIXELS.transpose(2, 0, 1), r"found ndarray of uint8 with shape \(3, 9, 7\)"),
        (PIXELS[:0], r"found ndarray of uint8 with shape \(0, 7, 3\)"),
        (PIXELS[0, 0], r"found ndarray of uint8 with shape \(3,\)"),
        (io.StringIO("text"), "found a file opened as text"),
    ],
)
def test_other_things_are_refused_when_the_image_is_made(given, found):
    with pytest.raises(TypeError, match=rf"image: {found}, expected a PIL image, a path"):
        Image(given)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("https://example.org/a.png", "addresses are never fetched"),
        ("file:///a.png", "addresses are never fetched"),
        ("data:image/png,abc", "not a data: URL of base64"),
        ("data:image/png;base64,###", "not a data: URL of base64"),
    ],
)
def test_strings_that_are_no_paths_are_refused(given, sentence):
    with pytest.raises(ImageError, match=sentence):
        Image(given)


@pytest.mark.parametrize("given", [b"", io.BytesIO(b"x"), "nowhere.png", "a\0b"])
def test_what_holds_no_image_is_an_error_of_its_document(given):
    with pytest.raises(ImageError, match="image "):
        Image(given).load()
