"""The multi-modal feature synchronizer (MMFS): queries look into the feature pyramids of earlier images.

`FeatureSynchronizer` is the paper's module (section 3.2) and stands alone; `GatedSynchronizer` is its form
inside a language-model layer. The U-Net's form is in `unet.py`.
Letters: B rows, Q queries, N images, H heads, L levels, P points, S cells an image, C feature channels,
D query channels, V value channels, E terms a head (see `ops.attention`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mm_interleaved.ops import SamplingPlan, multi_image_deformable_attention, sampling_plan
from mm_interleaved.visibility import relative_image_index

CENTRE = 0.5


class ImageValues(NamedTuple):
    """Projected features of images, ready to be sampled; they depend on the images alone, so keep them.

    `value`: (B, N, S, H, V / H). `level_sizes`: width and height of each square level, largest first.
    """

    value: Tensor
    level_sizes: tuple[int, ...]


def flatten_pyramid(maps: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Square maps (..., C, s, s), largest first, as cells (..., S, C) and their sizes.

    Raises:
        ValueError: a map is not square.
    """
    for level_map in maps:
        if level_map.shape[-1] != level_map.shape[-2]:
            raise ValueError(f"feature maps must be square, got {tuple(level_map.shape)}")
    cells = [level_map.flatten(-2).transpose(-1, -2) for level_map in maps]
    return torch.cat(cells, dim=-2), tuple(level_map.shape[-1] for level_map in maps)


class PointLinear(nn.Linear):
    """A linear layer that can be called without its bias.

    Called, and not read by attribute: weights that transformers offloads are only there during a call.
    """

    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias if with_bias else None)


class FeatureSynchronizer(nn.Module):
    """Lets any queries look into the multi-scale feature maps of any number of images.

    Each query draws, for each image that it may see, a few points (the same on all levels of the pyramid) and
    a weight for each point and level; all weights of a query and the weight of looking nowhere sum to one.

    Args:
        query_dim: channels of the queries and of the output.
        feature_dim: channels of the feature maps.
        value_dim: channels that are sampled, divided over the heads.
        num_levels: levels of each image's pyramid.
        max_images: rows of the relative-index table; a query sees fewer than this many images.
        base_size: cells of the map in whose cells offsets are measured.
        offset_spread: points start uniformly within this many base cells of the reference point.

    Example: anyone's queries, anyone's feature maps.

        >>> import torch
        >>> from mm_interleaved import FeatureSynchronizer
        >>> synchronizer = FeatureSynchronizer(
        ...     query_dim=32, feature_dim=24, value_dim=16, num_heads=4, num_levels=2, num_points=4,
        ...     max_images=10, base_size=8,
        ... )
        >>> # One row, three images, two levels.
        >>> maps = [torch.randn(1, 3, 24, 16, 16), torch.randn(1, 3, 24, 8, 8)]
        >>> values = synchronizer.project_values(maps)  # once per image; keep them
        >>> query = torch.randn(1, 5, 32)
        >>> visible = torch.tensor([[[1, 1, 0]] * 5], dtype=torch.bool)  # (row, query, image)
        >>> synchronizer(query, values, visible).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        value_dim: int,
        num_heads: int = 16,
        num_levels: int = 3,
        num_points: int = 8,
        max_images: int = 50,
        base_size: float = 16,
        offset_spread: float = 3.0,
        implementation: str = "auto",
    ):
        super().__init__()
        if value_dim % num_heads:
            raise ValueError(f"value_dim {value_dim} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.max_images, self.base_size, self.offset_spread = max_images, base_size, offset_spread
        self.implementation = implementation
        self.query_projection = nn.Linear(query_dim, query_dim)
        self.relative_index_embedding = nn.Embedding(max_images, query_dim)
        self.sampling_offsets = PointLinear(query_dim, num_heads * num_points * 2)
        # One row a level more than there are points: the released checkpoint carries it, and nothing reads
        # it, because the weight of looking nowhere is the constant logit zero.
        self.attention_logits = PointLinear(query_dim, num_heads * num_levels * (num_points + 1))
        self.value_projection = nn.Linear(feature_dim, value_dim)
        self.output_projection = nn.Linear(value_dim, query_dim)
        self.ignore_value = nn.Parameter(torch.zeros(value_dim), requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper's code: points spread around the reference, all weights equal."""
        init.xavier_uniform_(self.query_projection.weight)
        init.zeros_(self.query_projection.bias)
        init.trunc_normal_(self.relative_index_embedding.weight, std=0.02)
        init.zeros_(self.sampling_offsets.weight)
        init.uniform_(self.sampling_offsets.bias, -self.offset_spread, self.offset_spread)
        init.zeros_(self.attention_logits.weight)
        init.zeros_(self.attention_logits.bias)
        for projection in (self.value_projection, self.output_projection):
            init.xavier_uniform_(projection.weight)
            init.zeros_(projection.bias)
        init.zeros_(self.ignore_value)

    def project_values(self, maps: Sequence[Tensor]) -> ImageValues:
        """Project feature maps (B, N, C, s, s), one a level and largest first; B and N may be any leading
        axes.
        """
        cells, level_sizes = flatten_pyramid(maps)
        return self.project_cells(cells, level_sizes)

    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """Project flattened features, see `flatten_pyramid`."""
        if len(level_sizes) != self.num_levels:
            raise ValueError(f"this synchronizer looks into {self.num_levels} levels, got {len(level_sizes)}")
        value = self.value_projection(cells_BNSC)
        return ImageValues(value.unflatten(-1, (self.num_heads, -1)), level_sizes)

    def forward(
        self, query_BQD: Tensor, values: ImageValues, visible_BQN: Tensor, reference_BQ2: Tensor | None = None
    ) -> Tensor:
        """What the queries see.

        Args:
            query_BQD: queries, already normalised.
            values: result of `project_values`.
            visible_BQN: bool, True where query q may look at image n; or the int64 result of
                `visibility.relative_image_index`, to save its computation. Images are ordered from old to
                new.
            reference_BQ2: (x, y) in [0, 1] from the upper left corner of each image; default its centre. May
                have one row for all.

        Returns:
            (B, Q, D); the output bias (and the ignore value) where nothing is visible.

        Raises:
            ValueError: a query sees `max_images` or more.
        """
        relative_index_BQN = self._relative_index(visible_BQN)
        query_term, index_term = self._terms(query_BQD)
        out_BQHd = multi_image_deformable_attention(
            values.value,
            query_term,
            index_term,
            relative_index_BQN,
            self._reference(reference_BQ2, query_term),
            values.level_sizes,
            num_points=self.num_points,
            base_size=self.base_size,
            ignore_HD=self.ignore_value.view(self.num_heads, -1),
            implementation=self.implementation,
        )
        return self.output_projection(out_BQHd.flatten(2).to(self.output_projection.weight.dtype))

    def plan(
        self, query_BQD: Tensor, visible_BQN: Tensor, reference_BQ2: Tensor | None = None
    ) -> SamplingPlan:
        """Where the queries look and how much each place weighs; arguments as `forward`."""
        query_term, index_term = self._terms(query_BQD)
        return sampling_plan(
            query_term,
            index_term,
            self._relative_index(visible_BQN),
            self._reference(reference_BQ2, query_term),
            num_levels=self.num_levels,
            num_points=self.num_points,
            base_size=self.base_size,
        )

    def _terms(self, query_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and logits from the query alone (B, Q, H, E) and from each relative index alone (K, H, E).

        Linear in the sum of both, so each is projected once instead of once per query and image.
        """
        query_BQHE = self._offsets_and_logits(self.query_projection(query_BQD), with_bias=True)
        index_K = torch.arange(self.max_images, device=query_BQD.device)
        index_KHE = self._offsets_and_logits(self.relative_index_embedding(index_K), with_bias=False)
        return query_BQHE, index_KHE

    def _offsets_and_logits(self, x: Tensor, *, with_bias: bool) -> Tensor:
        H, L, P = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(x, with_bias=with_bias)
        logits = self.attention_logits(x, with_bias=with_bias)
        logits = logits.unflatten(-1, (H, L, P + 1))[..., :P].flatten(-2)
        terms = torch.cat([offsets.unflatten(-1, (H, 2 * P)), logits], dim=-1)
        # Coordinates in half precision are off by up to an eighth of a cell on a map of 64: keep them in
        # float32.
        return terms.float() if terms.dtype in (torch.float16, torch.bfloat16) else terms

    def _reference(self, reference_BQ2: Tensor | None, term: Tensor) -> Tensor:
        if reference_BQ2 is None:
            return term.new_full((1, 1, 2), CENTRE)
        return reference_BQ2.to(term.dtype)

    def _relative_index(self, visible_BQN: Tensor) -> Tensor:
        index = relative_image_index(visible_BQN) if visible_BQN.dtype == torch.bool else visible_BQN
        # The maximum is only read (a device sync) where so many images are there at all.
        if index.shape[-1] >= self.max_images and int(index.max()) >= self.max_images:
            raise ValueError(
                f"a query sees {int(index.max())} images, at most {self.max_images - 1} are possible"
            )
        return index


class GatedSynchronizer(nn.Module):
    """The synchronizer of one language-model layer: `tanh(gate) * synchronizer(norm(hidden),
    norm(features))`.

    The gate starts at zero, so a pretrained language model starts unchanged (paper, section 3.2).
    """

    def __init__(
        self, synchronizer: FeatureSynchronizer, query_dim: int, feature_dim: int, *, norm_eps: float = 1e-6
    ):
        super().__init__()
        self.synchronizer = synchronizer
        self.query_norm = nn.RMSNorm(query_dim, eps=norm_eps)
        self.feature_norm = nn.RMSNorm(feature_dim, eps=norm_eps)
        self.gate = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.gate)

    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        return self.synchronizer.project_cells(self.feature_norm(cells_BNSC), level_sizes)

    def forward(self, hidden_BTD: Tensor, values: ImageValues, relative_index_BTN: Tensor) -> Tensor:
        """What is added to the residual stream: (B, T, D)."""
        return self.gate.tanh() * self.synchronizer(self.query_norm(hidden_BTD), values, relative_index_BTN)
