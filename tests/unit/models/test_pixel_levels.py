"""Levels of the pyramid that also get their own pixels: linear, and nothing without the option."""

import torch
from torch.nn import functional as F

from mm_interleaved.models.config import AdapterConfig
from tiny import tiny_model


def test_the_finest_levels_get_the_pixels_on_which_their_cells_lie():
    vision = tiny_model(adapter=AdapterConfig(stem_dim=4, pixel_levels=2)).vision.eval()
    pixels = torch.rand(2, 3, 32, 32)
    normalised = []
    handle = vision.adapter.register_forward_pre_hook(lambda _, given: normalised.append(given[1]))
    with torch.no_grad():
        whole = vision(pixels).pyramid
        projections = list(vision.adapter.pixel_projections)
        vision.adapter.pixel_projections = torch.nn.ModuleList()
        without = vision(pixels).pyramid
    handle.remove()
    size = 4 * whole[0].shape[-1]
    resized = F.interpolate(normalised[0], size=(size, size), mode="bilinear", align_corners=False)
    for level, projection in enumerate(projections):
        assert projection.kernel_size == (4 << level, 4 << level)
        torch.testing.assert_close(whole[level] - without[level], projection(resized), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], without[2:], strict=True))


def test_without_the_option_a_model_has_no_such_weights():
    assert not [name for name in tiny_model().state_dict() if "pixel_projections" in name]


def test_a_model_with_it_is_saved_and_loaded(tmp_path):
    from mm_interleaved.checkpoint.load import load_model

    model = tiny_model(adapter=AdapterConfig(stem_dim=4, pixel_levels=1)).eval()
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model", dtype="float32")
    assert again.config.part("adapter").pixel_levels == 1
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.vision(pixels).pyramid[0], model.vision(pixels).pyramid[0])
