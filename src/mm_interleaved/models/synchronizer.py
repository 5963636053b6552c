"""The multi-modal feature synchronizer (MMFS): queries attend to the feature pyramids of earlier images.

The paper's module (section 3.2), which stands alone. `GatedSynchronizer` is its form inside a language-model
layer, `MapSynchronizer` (`unet.py`) its form behind a map of the U-Net. It is written by its formula;
`folding.py` computes the same with fewer operations, chosen where `with_shortcut` stands.
Letters: B rows, Q queries, N images, H heads, L levels, P points, S cells an image, C feature
channels, D query channels, V value channels, d channels a head (V / H), E = 2 P + L P terms a head (see
`ops.attention`), K rows of the relative-index table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mm_interleaved.models.folding import attend, keep_features, with_shortcut
from mm_interleaved.models.image_values import ImageValues, check_levels, flatten_pyramid
from mm_interleaved.models.linear import OptionalBiasLinear
from mm_interleaved.models.offloading import value_of
from mm_interleaved.models.sampling_terms import Terms, checked_relative_index, sampling_terms
from mm_interleaved.models.weights_at_hand import FoldingCache
from mm_interleaved.ops import SamplingPlan, multi_image_deformable_attention, sampling_plan

KEEP = ("values", "features")


class FeatureSynchronizer(nn.Module):
    """Lets any queries attend to the multi-scale feature maps of any number of images (paper, section 3.2).

    For a query x and the images n that it may see (of the newest the relative index r is 1, of the one before
    2), in each head, with levels l and points p:

        z_n   = W_q x + b_q + e_r                            query_projection, relative_index_embedding
        Δ_np  = W_s z_n + b_s                                sampling_offsets, shared by all levels
        a_nlp = W_a z_n + b_a                                attention_logits
        α_nlp = exp(a_nlp) / (1 + Σ exp(a_nlp))              the 1: a constant logit of 0, look nowhere
        V_nl  = W_v F_nl + b_v                               value_projection of the feature maps
        y     = W_o [Σ α_nlp V_nl(x̂ + Δ_np / s) + α_0 m] + b_o     output_projection, base_size s

    Sums run over n, l and p. V is sampled bilinearly, zero outside; x̂ in [0, 1]² is the reference point; α_0,
    what the weights lack to one, goes to m, `ignore_value`.

    Args:
        query_dim: channels of the queries and of the output.
        feature_dim: channels of the feature maps.
        value_dim: channels that are sampled, divided over the heads.
        max_images: rows of the relative-index table; a query sees fewer than this many images.
        base_size: cells of the map in whose cells offsets are measured.
        offset_spread: points start uniformly within this many base cells of the reference point.
        implementation: see `ops.multi_image_deformable_attention`.
        keep: what is kept of an image: "values", projected for each layer, or "features", one copy for all
            layers, projected after sampling. The result is the same; features take a tenth of the memory in
            a language model with ten such layers, and time with every query.

    Example: anyone's queries, anyone's feature maps.

        >>> import torch
        >>> from mm_interleaved import FeatureSynchronizer
        >>> synchronizer = FeatureSynchronizer(query_dim=32, feature_dim=24, value_dim=16, num_levels=2)
        >>> maps = [torch.randn(1, 3, 24, 16, 16), torch.randn(1, 3, 24, 8, 8)]  # (row, image, ...), 2 levels
        >>> values = synchronizer.project_values(maps)  # once per image; keep them
        >>> query = torch.randn(1, 5, 32)
        >>> visible = torch.tensor([[[1, 1, 0]] * 5], dtype=torch.bool)  # (row, query, image)
        >>> synchronizer(query, values, visible).shape
        torch.Size([1, 5, 32])
    """

    ignore_value: Tensor

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        value_dim: int, num_heads: int = 16, num_levels: int = 3, num_points: int = 8, max_images: int = 50,
        base_size: float = 16, offset_spread: float = 3.0, implementation: str = "auto", keep: str = "values",
    ):  # fmt: skip
        super().__init__()
        if keep not in KEEP:
            raise ValueError(f"keep must be one of {KEEP}, found {keep!r}")
        if value_dim % num_heads:
            raise ValueError(f"value_dim {value_dim} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.max_images, self.base_size, self.offset_spread = max_images, base_size, offset_spread
        self.implementation, self.keep = implementation, keep
        self.query_projection = nn.Linear(query_dim, query_dim)
        self.relative_index_embedding = nn.Embedding(max_images, query_dim)
        self.sampling_offsets = OptionalBiasLinear(query_dim, num_heads * num_points * 2)
        # One row a level more than there are points is the released checkpoint's, and nothing reads it.
        self.attention_logits = OptionalBiasLinear(query_dim, num_heads * num_levels * (num_points + 1))
        self.value_projection = nn.Linear(feature_dim, value_dim)
        self.output_projection = nn.Linear(value_dim, query_dim)
        # A buffer: the released checkpoint's parameter is frozen, and transformers unfreezes what it loads.
        self.register_buffer("ignore_value", torch.zeros(value_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper's code: points spread around the reference, all weights equal."""
        init.xavier_uniform_(self.query_projection.weight)
        init.zeros_(self.query_projection.bias)
        init.trunc_normal_(self.relative_index_embedding.weight, std=0.02)
        init.uniform_(self.sampling_offsets.bias, -self.offset_spread, self.offset_spread)
        for zero in (self.sampling_offsets.weight, *self.attention_logits.parameters(), self.ignore_value):
            init.zeros_(zero)
        for projection in (self.value_projection, self.output_projection):
            init.xavier_uniform_(projection.weight)
            init.zeros_(projection.bias)

    def project_values(self, maps: Sequence[Tensor]) -> ImageValues:
        """V of feature maps (B, N, C, s, s), one a level, largest first; B and N may be any leading axes."""
        return self.project_cells(*flatten_pyramid(maps))

    @with_shortcut(keep_features)
    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """V of flattened features, see `flatten_pyramid`."""
        return self.projected(self.value_projection(cells_BNSC), level_sizes)

    def projected(self, value_BNSV: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """V divided over the heads."""
        check_levels(level_sizes, self.num_levels)
        return ImageValues(value_BNSV.unflatten(-1, (self.num_heads, -1)), level_sizes, folded=FoldingCache())

    @with_shortcut(attend)
    def forward(
        self, query_BQD: Tensor, values: ImageValues, visible_BQN: Tensor, reference_BQ2: Tensor | None = None
    ) -> Tensor:
        """y: (B, Q, D); where nothing is visible the output bias, with the ignore value.

        Args:
            query_BQD: x, already normalised.
            values: V, result of `project_values`.
            visible_BQN: bool, True where query q may look at image n, images from old to new; or the int64
                result of `tokens.visibility.relative_image_index`, to save its computation.
            reference_BQ2: x̂, (x, y) from the upper left corner of each image; default its centre. May have
                one row for all.

        Raises:
            ValueError: a query sees `max_images` or more.
        """
        terms = self.terms(query_BQD, visible_BQN, reference_BQ2)
        seen_BQV = self.sample(values, *terms)
        return self.output_projection(seen_BQV.to(self.output_projection.weight.dtype))

    def terms(self, query_BQD: Tensor, visible_BQN: Tensor, reference_BQ2: Tensor | None = None) -> Terms:
        """Δ and a, and what they are added to; arguments as `forward`.

        Both are linear in z, a sum: query and relative index are projected apart, not once a pair of them.
        """
        relative_index_BQN = checked_relative_index(visible_BQN, self.max_images)
        # Of the table only the rows that so many images can have.
        index_K = torch.arange(min(self.max_images, visible_BQN.shape[-1] + 1), device=query_BQD.device)
        query_BQHE = self._offsets_and_logits(self.query_projection(query_BQD), with_bias=True)
        index_KHE = self._offsets_and_logits(self.relative_index_embedding(index_K), with_bias=False)
        return sampling_terms(query_BQHE, index_KHE, relative_index_BQN, reference_BQ2)

    def _offsets_and_logits(self, z: Tensor, *, with_bias: bool) -> Tensor:
        H, L, P = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(z, with_bias=with_bias).unflatten(-1, (H, 2 * P))
        logits = self.attention_logits(z, with_bias=with_bias).unflatten(-1, (H, L, P + 1))[..., :P]
        return torch.cat([offsets, logits.flatten(-2)], dim=-1)

    def sample(self, values: ImageValues, *terms: Tensor, ignore_HD: Tensor | None = None) -> Tensor:
        """Σ α V(x̂ + Δ / s) + α_0 m: (B, Q, V). `terms`: see there. `ignore_HD`: m if another one."""
        if ignore_HD is None:
            ignore_HD = value_of(self, "ignore_value").view(self.num_heads, -1)
        seen_BQHd = multi_image_deformable_attention(
            values.value,
            *terms,
            level_sizes=values.level_sizes,
            num_points=self.num_points,
            base_size=self.base_size,
            ignore_HD=ignore_HD,
            image_BN=values.image_BN,
            implementation=self.implementation,
        )
        return seen_BQHd.flatten(2)


def plan_of(
    synchronizer: FeatureSynchronizer,
    query_BQD: Tensor,
    visible_BQN: Tensor,
    reference_BQ2: Tensor | None = None,
) -> SamplingPlan:
    """x̂ + Δ / s and α: where the queries of a synchronizer sample and how much it weighs; arguments as its
    `forward`.
    """
    return sampling_plan(
        *synchronizer.terms(query_BQD, visible_BQN, reference_BQ2),
        num_levels=synchronizer.num_levels,
        num_points=synchronizer.num_points,
        base_size=synchronizer.base_size,
    )
