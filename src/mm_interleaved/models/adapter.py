"""ViT-Adapter: a convolutional pyramid that talks with a plain vision transformer (arXiv 2205.08534).

Beside the transformer runs a pyramid of feature maps. Between groups of transformer layers an injector lets
the patch tokens look into the pyramid, and an extractor lets the pyramid look at the patch tokens.
Letters: I images, G cells along one side of the patch grid, C channels, T patch tokens (G * G), S cells of
the pyramid's three lower levels (sizes 2G, G, G/2), H heads, P points.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mm_interleaved.ops import deformable_sampling

STEM_NORM_EPS = 1e-6
ADAPTER_NORM_EPS = 1e-5


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (I, C, y, x), computed in float32."""

    def __init__(self, num_channels: int):
        super().__init__(num_channels, eps=STEM_NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Not torch's own, which would overwrite what a checkpoint filled.
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        channels_last = input.permute(0, 2, 3, 1).float()
        normed = F.layer_norm(
            channels_last, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(input.dtype).permute(0, 3, 1, 2)


class SpatialPrior(nn.Module):
    """A small convolutional network that reads details off the pixels: four maps, of sizes 4G, 2G, G, G/2."""

    def __init__(self, width: int, dim: int):
        super().__init__()

        def step(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
                ChannelNorm(out_channels),
                nn.ReLU(),
            ]

        self.stem = nn.Sequential(
            *step(3, width, 2),
            *step(width, width, 1),
            *step(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*step(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*step(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*step(4 * width, 4 * width, 2))
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.projections = nn.ModuleList(nn.Conv2d(level_width, dim, 1) for level_width in widths)

    def forward(self, pixels_I3yx: Tensor) -> list[Tensor]:
        level_1 = self.stem(pixels_I3yx)
        level_2 = self.conv2(level_1)
        level_3 = self.conv3(level_2)
        level_4 = self.conv4(level_3)
        levels = (level_1, level_2, level_3, level_4)
        return [project(level) for project, level in zip(self.projections, levels, strict=True)]


class DeformableAttention(nn.Module):
    """Deformable attention of one pyramid (arXiv 2010.04159): plain softmax over levels and points.

    Offsets are measured in cells of the level they sample, other than in the synchronizer.
    """

    def __init__(self, dim: int, *, num_heads: int, num_levels: int, num_points: int, value_dim: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_logits = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(dim, value_dim)
        self.output_projection = nn.Linear(value_dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Points start on rays around the reference, one direction a head (Deformable DETR, appendix A.4)."""
        H, L, P = self.num_heads, self.num_levels, self.num_points
        init.zeros_(self.sampling_offsets.weight)
        angle_H = torch.arange(H, dtype=torch.float32) * (2 * torch.pi / H)
        ray_H2 = torch.stack([angle_H.cos(), angle_H.sin()], dim=-1)
        ray_H2 = ray_H2 / ray_H2.abs().amax(-1, keepdim=True)
        distance_P = torch.arange(1, P + 1, dtype=torch.float32)
        bias_HLP2 = (ray_H2[:, None, None] * distance_P[None, None, :, None]).expand(H, L, P, 2)
        init.copy_(self.sampling_offsets.bias, bias_HLP2.reshape(-1))
        init.zeros_(self.attention_logits.weight)
        init.zeros_(self.attention_logits.bias)
        for projection in (self.value_projection, self.output_projection):
            init.xavier_uniform_(projection.weight)
            init.zeros_(projection.bias)

    def forward(
        self, query_IQC: Tensor, feature_ISC: Tensor, level_sizes: Sequence[int], reference_Q2: Tensor
    ) -> Tensor:
        """Let queries at `reference_Q2` ((x, y) in [0, 1]) look into the cells of a pyramid: (I, Q, C)."""
        H, L, P = self.num_heads, self.num_levels, self.num_points
        value_ISHd = self.value_projection(feature_ISC).unflatten(-1, (H, -1))
        offset_IQHLP2 = self.sampling_offsets(query_IQC).unflatten(-1, (H, L, P, 2)).to(reference_Q2.dtype)
        weight_IQHLP = self.attention_logits(query_IQC).unflatten(-1, (H, L * P)).to(reference_Q2.dtype)
        weight_IQHLP = weight_IQHLP.softmax(-1).unflatten(-1, (L, P))
        size_L11 = reference_Q2.new_tensor(level_sizes)[:, None, None]
        location_IQHLP2 = reference_Q2[:, None, None, None] + offset_IQHLP2 / size_L11
        out_IQHd = deformable_sampling(value_ISHd, level_sizes, location_IQHLP2, weight_IQHLP)
        return self.output_projection(out_IQHd.flatten(2))


class DepthwiseFeedForward(nn.Module):
    """Feed-forward layer of an extractor: its hidden channels see their neighbours on their own level."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.depthwise = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, cells_ISC: Tensor, level_sizes: Sequence[int]) -> Tensor:
        levels = self.fc1(cells_ISC).split([size * size for size in level_sizes], dim=1)
        convolved = [
            self.depthwise(level.transpose(1, 2).unflatten(2, (size, size))).flatten(2).transpose(1, 2)
            for level, size in zip(levels, level_sizes, strict=True)
        ]
        return self.fc2(F.gelu(torch.cat(convolved, dim=1)))


class Injector(nn.Module):
    """Patch tokens look into the pyramid; `gamma` starts at zero, so the transformer starts unchanged."""

    def __init__(self, attention: DeformableAttention, dim: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=ADAPTER_NORM_EPS)
        self.feature_norm = nn.LayerNorm(dim, eps=ADAPTER_NORM_EPS)
        self.attention = attention
        self.gamma = nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.gamma)

    def forward(self, patch_ITC: Tensor, cells_ISC: Tensor, level_sizes: Sequence[int]) -> Tensor:
        reference = cell_centres([round(patch_ITC.shape[1] ** 0.5)], patch_ITC)
        seen = self.attention(
            self.query_norm(patch_ITC), self.feature_norm(cells_ISC), level_sizes, reference
        )
        return patch_ITC + self.gamma * seen


class Extractor(nn.Module):
    """The pyramid's cells look at the patch tokens, then at their neighbours."""

    def __init__(self, attention: DeformableAttention, feed_forward: DepthwiseFeedForward, dim: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=ADAPTER_NORM_EPS)
        self.feature_norm = nn.LayerNorm(dim, eps=ADAPTER_NORM_EPS)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim, eps=ADAPTER_NORM_EPS)
        self.feed_forward = feed_forward

    def forward(self, cells_ISC: Tensor, patch_ITC: Tensor, level_sizes: Sequence[int]) -> Tensor:
        grid_size = round(patch_ITC.shape[1] ** 0.5)
        reference = cell_centres(level_sizes, cells_ISC)
        seen = self.attention(
            self.query_norm(cells_ISC), self.feature_norm(patch_ITC), [grid_size], reference
        )
        cells_ISC = cells_ISC + seen
        return cells_ISC + self.feed_forward(self.feed_forward_norm(cells_ISC), level_sizes)


class Interaction(nn.Module):
    """One exchange: inject, run a group of transformer layers, extract (three times in the last one)."""

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]):
        super().__init__()
        self.injector = injector
        self.extractors = nn.ModuleList(extractors)

    def forward(
        self,
        token_I1TC: Tensor,
        cells_ISC: Tensor,
        layers: Sequence[Callable[..., Tensor]],
        level_sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Tokens (class token first, then patches) and cells before and after: (I, 1 + T, C), (I, S, C)."""
        class_I1C, patch_ITC = token_I1TC[:, :1], token_I1TC[:, 1:]
        patch_ITC = self.injector(patch_ITC, cells_ISC, level_sizes)
        token_I1TC = torch.cat([class_I1C, patch_ITC], dim=1)
        for layer in layers:
            token_I1TC = layer(token_I1TC, attention_mask=None)
        for extractor in self.extractors:
            cells_ISC = extractor(cells_ISC, token_I1TC[:, 1:], level_sizes)
        return token_I1TC, cells_ISC


def pixel_projections(dim: int, num_levels: int) -> nn.ModuleList:
    """One linear layer for each of the finest levels: the pixels of a cell, at sixteen a patch, to `dim`."""
    return nn.ModuleList(nn.Conv2d(3, dim, 4 << level, stride=4 << level) for level in range(num_levels))


class VisionAdapter(nn.Module):
    """Everything that ViT-Adapter adds to a vision transformer.

    Args:
        dim: channels of the transformer.
        num_heads: heads of the deformable attention (those of the transformer in the released model).
        num_interactions: exchanges; the transformer's layers are divided evenly among them.
        pixel_levels: how many of the finest levels also get the pixels on which their cells lie, through one
            linear layer a level. An image decoder copies from there what nobody has a name for.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        stem_dim: int = 64,
        num_points: int = 4,
        value_ratio: float = 0.5,
        feed_forward_ratio: float = 0.25,
        num_interactions: int = 4,
        num_extra_extractors: int = 2,
        pixel_levels: int = 0,
    ):
        super().__init__()
        attention_sizes = {
            "num_heads": num_heads,
            "num_points": num_points,
            "value_dim": int(dim * value_ratio),
        }

        def extractor() -> Extractor:
            attention = DeformableAttention(dim, num_levels=1, **attention_sizes)
            return Extractor(attention, DepthwiseFeedForward(dim, int(dim * feed_forward_ratio)), dim)

        def interaction(num_extractors: int) -> Interaction:
            injector = Injector(DeformableAttention(dim, num_levels=3, **attention_sizes), dim)
            return Interaction(injector, [extractor() for _ in range(num_extractors)])

        num_extractors = [1] * (num_interactions - 1) + [1 + num_extra_extractors]
        self.spatial_prior = SpatialPrior(stem_dim, dim)
        self.level_embedding = nn.Parameter(torch.zeros(3, dim))
        self.interactions = nn.ModuleList(interaction(number) for number in num_extractors)
        self.upsample = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.pixel_projections = pixel_projections(dim, pixel_levels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.normal_(self.level_embedding)

    def forward(
        self, token_I1TC: Tensor, pixels_I3yx: Tensor, layers: Sequence[Callable[..., Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the transformer's layers beside the pyramid.

        Args:
            token_I1TC: embedded tokens, class token first, before the first layer.
            pixels_I3yx: normalised pixels.
            layers: the transformer's layers; their number is a multiple of the number of interactions.

        Returns:
            the last tokens (I, 1 + T, C) and four maps (I, C, s, s) with s = 4G, 2G, G, G/2.
        """
        G = round((token_I1TC.shape[1] - 1) ** 0.5)
        level_sizes = (2 * G, G, G // 2)

        # 1. Sixteen pixels a patch, whatever the transformer's patch size, give these level sizes.
        resized = F.interpolate(pixels_I3yx, size=(16 * G, 16 * G), mode="bilinear", align_corners=False)
        finest, *lower = self.spatial_prior(resized)
        cells_ISC = torch.cat(
            [level.flatten(2).transpose(1, 2) + self.level_embedding[i] for i, level in enumerate(lower)],
            dim=1,
        )

        # 2. Exchange with the transformer, and keep its patch map after each group of layers.
        group = len(layers) // len(self.interactions)
        patch_maps = []
        for i, interaction in enumerate(self.interactions):
            token_I1TC, cells_ISC = interaction(
                token_I1TC, cells_ISC, layers[i * group : (i + 1) * group], level_sizes
            )
            patch_maps.append(token_I1TC[:, 1:].transpose(1, 2).unflatten(2, (G, G)))

        # 3. Join: each level gets one of the last four patch maps, the early ones the fine levels.
        levels = [
            level.transpose(1, 2).unflatten(2, (size, size))
            for level, size in zip(
                cells_ISC.split([size * size for size in level_sizes], dim=1), level_sizes, strict=True
            )
        ]
        pyramid = [self.upsample(levels[0]) + finest, *levels]
        for i, patch_map in enumerate(patch_maps[-4:]):
            size = pyramid[i].shape[-2:]
            if size != patch_map.shape[-2:]:
                patch_map = F.interpolate(patch_map, size=size, mode="bilinear", align_corners=False)
            pyramid[i] = pyramid[i] + patch_map
        for i, projection in enumerate(self.pixel_projections):
            pyramid[i] = pyramid[i] + projection(resized)
        return token_I1TC, tuple(pyramid)


def cell_centres(level_sizes: Sequence[int], like: Tensor) -> Tensor:
    """(x, y) in [0, 1] of the centres of all cells of square levels, level after level, row-major: (S, 2).

    At least float32, whatever the dtype of `like`.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    centres = []
    for size in level_sizes:
        axis = (torch.arange(size, device=like.device, dtype=dtype) + 0.5) / size
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        centres.append(torch.stack([x.reshape(-1), y.reshape(-1)], dim=-1))
    return torch.cat(centres)
