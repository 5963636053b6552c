"""With hand-set weights a map's synchronizer copies what stands at the same place of an earlier image.

So levels, cells, pixels and offsets mean the same places, and a gradient tells offsets which way is better.
Letters: I images, C channels, y and x rows and columns of a map.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm_interleaved.models.image_values import flatten_pyramid
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import MapSynchronizer
from mm_interleaved.tokens.visibility import relative_image_index

CHANNELS = 8
SURE = 40.0
"""A logit beside which the 1 of looking nowhere is nothing."""


def copier(level, num_levels=2, offset=(0.0, 0.0), heads=2, points=3):
    """Gives back the features of one level at each pixel's own place, moved by `offset` base cells."""
    synchronizer = FeatureSynchronizer(
        CHANNELS,
        CHANNELS,
        value_dim=CHANNELS,
        num_heads=heads,
        num_levels=num_levels,
        num_points=points,
        base_size=16,
    )
    block = MapSynchronizer(synchronizer, CHANNELS, CHANNELS, grid_size=16).double()
    with torch.no_grad():
        for linear in (synchronizer.value_projection, synchronizer.output_projection):
            nn.init.eye_(linear.weight)
        nn.init.dirac_(block.conv.weight)
        synchronizer.sampling_offsets.bias.copy_(
            torch.tensor(offset, dtype=torch.float64).repeat(heads * points)
        )
        logits = torch.full((heads, num_levels, points + 1), -SURE, dtype=torch.float64)
        logits[:, level, 1] = SURE
        synchronizer.attention_logits.bias.copy_(logits.flatten())
    return block


def features(*sizes, count=2):
    """Maps whose cells have mean 0 and deviation 1, so that the norm before the synchronizer keeps them."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(count, CHANNELS, size, size, generator=generator, dtype=torch.float64) for size in sizes
    ]
    return [F.layer_norm(m.movedim(1, -1), (CHANNELS,), eps=1e-12).movedim(-1, 1) for m in maps]


def copied(block, maps, size):
    query = torch.randn(len(maps[0]), CHANNELS, *size, dtype=torch.float64)
    values = block.project_cells(*flatten_pyramid([m[:, None] for m in maps]))
    visible = torch.ones(len(query), 1, dtype=torch.bool)
    return block(query, values, relative_image_index(visible))


@pytest.mark.parametrize("level", [0, 1])
def test_a_map_as_fine_as_the_level_gets_each_cell_at_its_pixel(level):
    maps = features(16, 8)
    seen = copied(copier(level), maps, maps[level].shape[-2:])
    torch.testing.assert_close(seen, maps[level], atol=1e-5, rtol=0)


def test_a_map_half_as_fine_gets_the_mean_of_four_cells():
    maps = features(32, 8)
    torch.testing.assert_close(copied(copier(0), maps, (16, 16)), F.avg_pool2d(maps[0], 2), atol=1e-5, rtol=0)


def test_a_map_twice_as_fine_gets_what_lies_between():
    maps = features(16, 8)
    expected = F.interpolate(maps[0], scale_factor=2, mode="bilinear", align_corners=False)
    seen = copied(copier(0), maps, (32, 32))
    # At the edges the op sees zeros where `interpolate` repeats the last cell.
    torch.testing.assert_close(seen[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [(1.0, 0.0), (0.0, -2.0), (-3.0, 2.0)])
def test_offsets_are_cells_of_the_base_right_and_down(offset):
    maps = features(16, 8)
    seen = copied(copier(0, offset=offset), maps, (16, 16))
    x, y = (int(part) for part in offset)
    expected = torch.zeros_like(seen)
    for row in range(16):
        for column in range(16):
            if 0 <= row + y < 16 and 0 <= column + x < 16:
                expected[..., row, column] = maps[0][..., row + y, column + x]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [0, 1])
def test_the_gradient_of_an_offset_is_the_slope_of_what_is_sampled(level):
    """Per base cell: the difference of neighbours, as steep as the level is fine; no other point gets any."""
    maps = features(16, 8)
    size = maps[level].shape[-1]
    shift = 0.3 * 16 / size
    block = copier(level, offset=(shift, 0.0))
    weight = torch.randn(2, CHANNELS, size, size, dtype=torch.float64)
    weight[..., -1] = 0
    (copied(block, maps, (size, size)) * weight).sum().backward()
    slope = maps[level][..., 1:] - maps[level][..., :-1]
    expected = (weight[..., :-1] * slope).unflatten(1, (2, -1)).sum((0, 2, 3, 4)) * size / 16
    gradient = block.synchronizer.sampling_offsets.bias.grad.view(2, 3, 2)
    torch.testing.assert_close(gradient[:, 1, 0], expected, atol=1e-5, rtol=1e-5)
    assert gradient[:, [0, 2]].abs().max() < 1e-10


def test_nothing_but_the_convolution_learns_in_the_first_step_of_a_closed_block():
    """The paper's start: what is looked at learns once the convolution has moved."""
    block = copier(0, offset=(0.3, 0.3))
    nn.init.zeros_(block.conv.weight)
    maps = features(16, 8)
    copied(block, maps, (16, 16)).square().sum().backward()
    assert block.synchronizer.sampling_offsets.bias.grad.abs().max() == 0
    (copied(block, maps, (16, 16)) - maps[0]).square().sum().backward()
    assert block.conv.weight.grad.abs().max() > 0
    assert block.synchronizer.sampling_offsets.bias.grad.abs().max() == 0
