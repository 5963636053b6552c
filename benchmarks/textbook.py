"""The synchronizer as the textbook computes it: what every benchmark compares with.

Written from the formulas (paper, section 3.2), in the order of the released code: the features of every image
are normalised and projected in every call, hidden images too; queries are repeated for each image before any
linear layer; each level of each image has its own slot for attending to nothing; samples are taken by
`grid_sample`, one call a level and image, and kept until they are weighed. It borrows the weights of our
modules, so that both sides compute the same function.
Letters: B rows, Q queries, N images, H heads, L levels, P points, S cells an image, C feature channels, D
query channels, V value channels, d channels a head (V / H), I images being denoised, K earlier images each
attends to, X channels of a map, y and x its rows and columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import Between, MapSynchronizer, UNetSynchronizers

HIDDEN = -10000.0
"""What the released code adds to the logits of hidden images."""

Sample = Callable[[Tensor, Sequence[int], Tensor, Tensor], Tensor]


def grid_sampling(
    value_BSHd: Tensor, level_sizes: Sequence[int], location_BQHLP2: Tensor, weight_BQHLP: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples, (B, Q, H, d): all samples side by side, then weighed.

    Half precision is sampled in float32, as the released CUDA code does; places stay as exact as they came.
    """
    B, _, H, d = value_BSHd.shape
    Q = location_BQHLP2.shape[1]
    single = torch.promote_types(value_BSHd.dtype, torch.float32)
    grid_BQHLP2 = 2 * location_BQHLP2.to(single) - 1
    samples, start = [], 0
    for level, size in enumerate(level_sizes):
        map_BHd = value_BSHd[:, start : start + size * size].to(single).permute(0, 2, 3, 1)
        grid_BHQP2 = grid_BQHLP2[:, :, :, level].transpose(1, 2)
        samples.append(
            F.grid_sample(
                map_BHd.reshape(B * H, d, size, size),
                grid_BHQP2.flatten(0, 1),
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )
        )
        start += size * size
    sample_ndQj = torch.stack(samples, dim=-2).flatten(-2)
    weight_n1Qj = weight_BQHLP.to(single).transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    out_ndQ = (sample_ndQj * weight_n1Qj).sum(-1)
    return out_ndQ.view(B, H, d, Q).permute(0, 3, 1, 2).to(value_BSHd.dtype)


class TextbookSynchronizer(nn.Module):
    """The formulas over the weights of a `FeatureSynchronizer`.

    Args:
        sample: what takes and weighs the samples; see `grid_sampling`.
    """

    def __init__(self, ours: FeatureSynchronizer, sample: Sample = grid_sampling):
        super().__init__()
        self.ours, self.sample = ours, sample
        self.value_projection = nn.Identity()

    # What our models ask of a synchronizer that features are to be projected for.

    def projected(self, cells: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """The features themselves, with an axis where heads would stand."""
        return ImageValues(cells.unsqueeze(-2), level_sizes)

    def forward(
        self,
        query_BQD: Tensor,
        cells_BNSC: Tensor,
        visible_BQN: Tensor,
        level_sizes: Sequence[int],
        reference_BQ2: Tensor | None = None,
    ) -> Tensor:
        """What the queries see: (B, Q, D).

        Args:
            cells_BNSC: normalised features, not projected.
            visible_BQN: bool, True where a query may attend to an image.
            reference_BQ2: (x, y) in [0, 1]; default the centre.
        """
        weights, (B, Q, D), N = self.ours, query_BQD.shape, cells_BNSC.shape[1]
        H, L, P = weights.num_heads, weights.num_levels, weights.num_points

        # 1. Values of all images.
        value_BmHd = weights.value_projection(cells_BNSC).flatten(1, 2).unflatten(-1, (H, -1))

        # 2. One query an image, with how far back the image is: 1 = newest, 0 = hidden.
        index_BQN = (visible_BQN.sum(-1, keepdim=True) + 1 - visible_BQN.cumsum(-1)) * visible_BQN
        query_BQND = query_BQD[:, :, None].expand(B, Q, N, D).contiguous()
        query_BQND = weights.query_projection(query_BQND) + weights.relative_index_embedding(index_BQN)

        # 3. Places: offsets are shared by the levels and measured in cells of the base map.
        size_L = torch.tensor(level_sizes, device=query_BQD.device, dtype=query_BQD.dtype)
        offset_BQNHP2 = weights.sampling_offsets(query_BQND).view(B, Q, N, H, P, 2)
        offset_BQNHLP2 = offset_BQNHP2[:, :, :, :, None] * (size_L / weights.base_size)[:, None, None]
        if reference_BQ2 is None:
            reference_BQ2 = query_BQD.new_full((1, 1, 2), 0.5)
        reference = reference_BQ2.to(query_BQD.dtype)[:, :, None, None, None, None]
        location_BQNHLP2 = reference + offset_BQNHLP2 / size_L[:, None, None]

        # 4. Weights: one softmax over all images, levels, points and slots for attending to nothing.
        logit_BQNHLp = weights.attention_logits(query_BQND).view(B, Q, N, H, L, P + 1)
        logit_BQNHLp = logit_BQNHLp + HIDDEN * (~visible_BQN)[..., None, None, None].to(logit_BQNHLp.dtype)
        nowhere = torch.full_like(logit_BQNHLp[..., :1], -math.log(N * L))
        logit_BQNHLp = torch.cat([logit_BQNHLp[..., :-1], nowhere], dim=-1)
        weight_BQHj = logit_BQNHLp.transpose(2, 3).flatten(3).softmax(-1)
        weight_BQHNLp = weight_BQHj.view(B, Q, H, N, L, P + 1)

        # 5. Samples of all images, hidden ones too.
        seen_BQHd = self.sample(
            value_BmHd,
            tuple(level_sizes) * N,
            location_BQNHLP2.transpose(2, 3).flatten(3, 4),
            weight_BQHNLp[..., :-1].flatten(3, 4),
        )
        ignored_BQH1 = weight_BQHNLp[..., -1].flatten(3).sum(-1, keepdim=True)
        seen_BQHd = seen_BQHd + ignored_BQH1 * weights.ignore_value.view(H, -1)
        return weights.output_projection(seen_BQHd.flatten(2))


class TextbookGate(nn.Module):
    """The form inside a language-model layer; stands where our `GatedSynchronizer` stands."""

    def __init__(self, ours: GatedSynchronizer, sample: Sample = grid_sampling):
        super().__init__()
        self.ours, self.synchronizer = ours, TextbookSynchronizer(ours.synchronizer, sample)
        self.feature_norm = nn.Identity()

    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """Nothing is kept but the features themselves."""
        return self.synchronizer.projected(cells_BNSC, level_sizes)

    def forward(self, hidden_BTD: Tensor, values: ImageValues, relative_index_BTN: Tensor) -> Tensor:
        norm = self.ours.feature_norm
        features_BNSC = _root_mean_square_norm(_features_by_row(values), norm.weight, norm.eps)
        norm = self.ours.query_norm
        query_BTD = _root_mean_square_norm(hidden_BTD, norm.weight, norm.eps)
        seen_BTD = self.synchronizer(query_BTD, features_BNSC, relative_index_BTN > 0, values.level_sizes)
        return self.ours.gate.tanh() * seen_BTD


class TextbookMap(nn.Module):
    """The form behind a map of the U-Net."""

    def __init__(self, ours: MapSynchronizer, sample: Sample = grid_sampling):
        super().__init__()
        self.ours, self.synchronizer = ours, TextbookSynchronizer(ours.synchronizer, sample)

    def forward(
        self, map_IXyx: Tensor, cells_IKSC: Tensor, visible_IK: Tensor, level_sizes: Sequence[int]
    ) -> Tensor:
        """What is added to the map: (I, X, y, x). Arguments as `TextbookSynchronizer`."""
        norm, (height, width) = self.ours.feature_norm, map_IXyx.shape[-2:]
        features_IKSC = F.layer_norm(cells_IKSC, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        norm, table_QX = self.ours.query_norm, self.ours.position_table
        grid = math.isqrt(len(table_QX))
        if (grid, grid) != (height, width):
            # A constant, which both sides resize in single precision.
            table_1Xyx = table_QX.float().t().reshape(1, -1, grid, grid)
            resized = F.interpolate(table_1Xyx, (height, width), mode="bicubic", align_corners=False)
            table_QX = resized[0].flatten(1).t().to(table_QX.dtype)
        query_IQX = F.layer_norm(
            map_IXyx.flatten(2).transpose(1, 2), norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        exact = torch.promote_types(map_IXyx.dtype, torch.float32)
        y = (torch.arange(height, device=map_IXyx.device, dtype=exact) + 0.5) / height
        x = (torch.arange(width, device=map_IXyx.device, dtype=exact) + 0.5) / width
        centre_1Q2 = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)[None]
        seen_IQX = self.synchronizer(
            query_IQX + table_QX,
            features_IKSC,
            visible_IK[:, None].expand(-1, height * width, -1),
            level_sizes,
            centre_1Q2,
        )
        return self.ours.conv(seen_IQX.transpose(1, 2).reshape(map_IXyx.shape))


def textbook_between(
    synchronizers: UNetSynchronizers,
    cells_IKSC: Tensor,
    visible_IK: Tensor,
    level_sizes: Sequence[int],
    sample: Sample = grid_sampling,
) -> Between:
    """What `unet_forward` calls between its middle and its upward path."""
    blocks = [TextbookMap(block, sample) for block in (*synchronizers.skips, synchronizers.middle)]

    def between(middle: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        changed = [
            each + block(each, cells_IKSC, visible_IK, level_sizes)
            for block, each in zip(blocks, (*skips, middle), strict=True)
        ]
        return changed[-1], tuple(changed[:-1])

    return between


@contextmanager
def textbook_layers(language_model: Any, sample: Sample = grid_sampling) -> Iterator[None]:
    """Within, the layers of one of our language models attend to images as the textbook does.

    The values that their caches hold are then plain features: make caches inside, and use them inside.
    """
    layers = [language_model.layers[index] for index in language_model.synchronized_layers]
    ours = [layer.synchronizer for layer in layers]
    for layer in layers:
        layer.synchronizer = TextbookGate(layer.synchronizer, sample)
    try:
        yield
    finally:
        for layer, synchronizer in zip(layers, ours, strict=True):
            layer.synchronizer = synchronizer


def _features_by_row(values: ImageValues) -> Tensor:
    """(B, N, S, C); copied only where rows share images."""
    features, image_BN = values.value.squeeze(-2), values.image_BN
    if image_BN is None:
        return features
    features_JSC = features.flatten(0, -3)
    # A single row has its own images, in their order.
    return features_JSC[None] if len(image_BN) == 1 else features_JSC[image_BN]


def _root_mean_square_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    single = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(single.square().mean(-1, keepdim=True) + (eps or 0.0))
    return weight * (single * inverse).to(x.dtype)
