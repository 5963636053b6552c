"""The page, the overlays and the arrays of what a model looked at."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.generation.explanation import Explanation, ImageAttention, TextAttention
from mm_interleaved.runs.explanation import overlay, write_explanation


def picture(grey):
    return Image(PILImage.new("RGB", (24, 16), (grey, grey, grey)), generated=grey > 50)


@pytest.fixture(scope="module")
def explanation():
    """An image, a text that looks at its lower right, a second image whose regions look anywhere."""
    generator = torch.Generator().manual_seed(0)
    document = Document(id="s", parts=[picture(10), Text("a </script>", generated=True), picture(90)])
    location = torch.full((2, 1, 2, 2, 3, 2), 0.75)
    weight = torch.zeros(2, 1, 2, 2, 2, 3)
    weight[:, :, :, 0] = 0.1
    text = TextAttention(("a ", "</script>"), (1, 1), ("layer 0",), (0, 2), (8, 4), location, weight,
                         torch.full((2, 1, 2), 0.4))  # fmt: skip
    heat = torch.rand(4, 3, 2, 1, 2, 8, 8, generator=generator) / 256
    nothing = torch.zeros(4, 3, 2)
    image = ImageAttention(2, ("skip 0", "skip 1", "middle"), (0,), (8, 4), 2, heat, nothing, nothing, 0.0)
    return Explanation(document, text, (image,))


@pytest.fixture(scope="module")
def folder(explanation, tmp_path_factory):
    place = tmp_path_factory.mktemp("explained")
    write_explanation(place, explanation, "A <b>title</b>", "what tiny looked at")
    return place


def test_the_arrays_are_the_tensors(explanation, folder):
    with np.load(folder / "arrays.npz") as found:
        assert sorted(found) == sorted(explanation.arrays())
        for name, array in explanation.arrays().items():
            assert np.array_equal(found[name], array)
    labels = json.loads((folder / "explanation.json").read_text())
    assert [row["token"] for row in labels["text"]["T"]] == ["a ", "</script>"]
    assert labels["part2"]["Y"] == ["skip 0", "skip 1", "middle"] and labels["part2"]["N"] == ["part 0"]


def test_the_page_is_self_contained_and_text_cannot_break_out(folder):
    page = (folder / "index.html").read_text()
    assert "<b>title</b>" not in page and "&lt;/script&gt;" in page
    assert page.count("</script>") == 2
    assert "http" not in page.replace("Content-Security-Policy", "").replace("http-equiv", "")
    assert re.findall(r'src="(?!data:)', page) == []


def test_the_page_has_the_weights_to_within_a_two_hundredth(explanation, folder):
    page = (folder / "index.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])

    def unpacked(packed):
        raw = gzip.decompress(base64.b64decode(packed["data"]))
        kind = np.uint8 if packed["bits"] == 8 else np.dtype("<u2")
        return np.frombuffer(raw, kind).astype(float), packed["scale"]

    roots, scale = unpacked(data["regions"]["2"]["heat"])
    expected = explanation.images[0].heat_RYHNLGG.numpy().ravel()
    assert np.abs((roots / 255) ** 2 * scale - expected).max() <= scale / 200
    assert data["regions"]["2"]["shape"] == [3, 2, 1, 2, 8] and data["regions"]["2"]["side"] == 2
    places, _ = unpacked(data["text"]["location"])
    assert np.abs(2 * places / 65535 - 0.5 - 0.75).max() < 1e-4
    assert data["text"]["shape"] == [1, 2, 2, 2, 3]


def test_overlays_show_heat_where_it_is(folder):
    names = sorted(path.name for path in (folder / "overlays").iterdir())
    assert names == ["part_1.png", "part_2.png"]
    heat = np.zeros((8, 8))
    heat[6, 1] = 1
    plain, heated = (
        np.asarray(overlay(PILImage.new("RGB", (8, 8), (90, 90, 90)), each, 64)).astype(int)
        for each in (np.zeros((8, 8)), heat)
    )
    rows, columns = np.nonzero((plain != heated).any(-1))
    assert abs(rows.mean() - 52) < 2 and abs(columns.mean() - 12) < 2
    assert tuple(heated[52, 12] > plain[52, 12]) == (True, False, False)
