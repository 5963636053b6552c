"""The gallery shows every image that was generated, in the order of its prompts."""

from types import SimpleNamespace

import numpy as np
from PIL import Image as PILImage

from mm_interleaved.documents.document import Image
from mm_interleaved.storyworld.renderer import render_scene, sheet_of
from mm_interleaved.storyworld.tasks import document, part_pixels
from mm_interleaved.storyworld.world import scene_from_record
from studies.gallery import write_gallery


def generate_the_truth(asked, *, seed):
    pixels = render_scene(scene_from_record(asked.meta["scenes"][0]))
    generated = Image(PILImage.fromarray(pixels), generated=True)
    return type(asked)(id=asked.id, parts=(*asked.parts, generated))


def test_all_images_are_shown_and_scored(tmp_path):
    seen = []
    path = tmp_path / "new" / "gallery.png"
    scores = write_gallery(SimpleNamespace(generate=generate_the_truth), 3, 5, 3, path, seen.append)
    assert scores["draw.attributes"] == 1.0 and [each.id for each in seen] == [
        document("test", 3, index, "draw").id for index in range(5)
    ]
    sheet = np.asarray(PILImage.open(path))
    assert sheet.shape == (2 * 129, 2 * 194, 3)
    fourth = part_pixels(document("test", 3, 3, "draw").target[0])
    assert np.array_equal(sheet[130:258:2, :128:2], fourth)


def test_a_row_that_is_not_full_is_white():
    sheet = sheet_of(np.zeros((3, 64, 64, 3), np.uint8), 2, 1)
    assert sheet.shape == (129, 129, 3) and (sheet[65:, 65:] == 255).all() and (sheet[:64, :64] == 0).all()
