"""The multi-modal feature synchronizer (MMFS): queries look into the feature pyramids of earlier images.

`FeatureSynchronizer` is the paper's module (section 3.2) and stands alone; `GatedSynchronizer` is its form
inside a language-model layer. The U-Net's form is in `unet.py`. Wherever no gradient is asked for, linear
steps are folded into one (see `folding.py`), which changes no result.
Letters: B rows, Q queries, N images, J images that there are values of, H heads, L levels, P points, S cells
an image, C feature channels, D query channels, V value channels, d channels a head (V / H), E terms a head
(see `ops.attention`), K rows of the relative-index table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mm_interleaved.models.folding import FoldedOnce, FoldedTerms, fold_terms, weights_at_hand
from mm_interleaved.models.norms import normalize
from mm_interleaved.models.offloading import value_of
from mm_interleaved.ops import SamplingPlan, multi_image_deformable_attention, sampling_plan
from mm_interleaved.tokens.visibility import relative_image_index

CENTRE = 0.5
KEEP = ("values", "features")


class ImageValues(NamedTuple):
    """What is sampled, of images; it depends on the images alone, so keep it.

    `value`: (B, N, S, H, d), projected features. With `image_BN`, of J images under any leading axes, and
    `image_BN` (B, N) int64 says which stands where (row-major count; anything for a hidden image), so that
    rows share images without a copy. `level_sizes`: width and height of each square level, largest first.
    `is_projected`: False if `value` is (..., S, 1, C + 2), features that all heads and layers share and that
    are projected after sampling, see `features_to_sample`. `folded`: what else is kept for these images.
    """

    value: Tensor
    level_sizes: tuple[int, ...]
    image_BN: Tensor | None = None  # noqa: N815
    is_projected: bool = True
    folded: FoldedOnce | None = None


def unprojected(features: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
    """Kept as features, see `features_to_sample`."""
    return ImageValues(features, level_sizes, is_projected=False, folded=FoldedOnce())


def features_to_sample(cells: Tensor) -> Tensor:
    """Features (..., S, C) with two more channels, for one head that stands for all: (..., S, 1, C + 2).

    Sampling is linear, so it may come before the projection: `W sum(w_j x_j) + b m`. The sample of a channel
    of ones is m, the weight that falls onto the map (performance.md, E4: not the sum of all weights); the
    last channel is filled by looking nowhere alone.
    """
    one, zero = torch.ones_like(cells[..., :1]), torch.zeros_like(cells[..., :1])
    return torch.cat([cells, one, zero], dim=-1).unsqueeze(-2)


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
        implementation: see `ops.multi_image_deformable_attention`.
        keep: what is kept of an image: "values", projected for each layer, or "features", one copy for all
            layers, projected after sampling. The result is the same; features take a tenth of the memory in
            a language model with ten such layers, and time with every query.

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

    ignore_value: Tensor

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
        keep: str = "values",
    ):
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
        self.sampling_offsets = PointLinear(query_dim, num_heads * num_points * 2)
        # One row a level more than there are points: the released checkpoint carries it, and nothing reads
        # it, because the weight of looking nowhere is the constant logit zero.
        self.attention_logits = PointLinear(query_dim, num_heads * num_levels * (num_points + 1))
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
        self.check_levels(level_sizes)
        if self.keep == "features" and self.weights_at_hand() is not None:
            return unprojected(features_to_sample(cells_BNSC), level_sizes)
        return self.projected(self.value_projection(cells_BNSC), level_sizes)

    def projected(self, value_BNSV: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """Values as the heads share them."""
        value = value_BNSV.unflatten(-1, (self.num_heads, -1))
        return ImageValues(value, level_sizes, folded=FoldedOnce())

    def check_levels(self, level_sizes: tuple[int, ...]) -> None:
        if len(level_sizes) != self.num_levels:
            raise ValueError(
                f"this synchronizer looks into {self.num_levels} levels, found {len(level_sizes)}"
            )

    def forward(
        self,
        query_BQD: Tensor,
        values: ImageValues,
        visible_BQN: Tensor,
        reference_BQ2: Tensor | None = None,
        sampled_weights_HdC: Tensor | None = None,
    ) -> Tensor:
        """What the queries see.

        Args:
            query_BQD: queries, already normalised.
            values: result of `project_values`.
            visible_BQN: bool, True where query q may look at image n; or the int64 result of
                `tokens.visibility.relative_image_index`, to save its computation. Images are ordered from old
                to new.
            reference_BQ2: (x, y) in [0, 1] from the upper left corner of each image; default its centre. May
                have one row for all.
            sampled_weights_HdC: what projects sampled features; default `sampled_weights()`. Only where
                features were kept.

        Returns:
            (B, Q, D); the output bias (and the ignore value) where nothing is visible.

        Raises:
            ValueError: a query sees `max_images` or more.
        """
        relative_index_BQN = self.checked_index(visible_BQN)
        if relative_index_BQN.shape[-1] == 0:
            return self.nothing_seen().expand(*query_BQD.shape[:-1], -1)
        tables = self._tables(values)
        if tables is None:
            query_term, index_term = self._terms(query_BQD, relative_index_BQN.shape[-1])
            if sampled_weights_HdC is None and not values.is_projected:
                sampled_weights_HdC = self.sampled_weights()
        else:
            query_term, index_term = tables.terms.of(query_BQD), tables.terms.index
            if sampled_weights_HdC is None:
                sampled_weights_HdC = tables.sampled_weights
        seen_BQV = self.look(
            query_term, index_term, relative_index_BQN, values, sampled_weights_HdC, reference_BQ2
        )
        return self.output_projection(seen_BQV.to(self.output_projection.weight.dtype))

    def look(
        self,
        query_term_BQHE: Tensor,
        index_term_KHE: Tensor,
        relative_index_BQN: Tensor,
        values: ImageValues,
        sampled_weights_HdC: Tensor | None = None,
        reference_BQ2: Tensor | None = None,
    ) -> Tensor:
        """The sampling alone, between the linear layers before and after it: (B, Q, V).

        Args:
            sampled_weights_HdC: what projects sampled features, see `sampled_weights`; only with those.
        """
        ignore_HD = value_of(self, "ignore_value").view(self.num_heads, -1)
        if not values.is_projected:
            last_channel = torch.arange(values.value.shape[-1], device=values.value.device)
            nowhere_D = (last_channel == last_channel[-1]).to(values.value.dtype)
            ignore_HD = nowhere_D.expand(self.num_heads, -1)
        out_BQHd = multi_image_deformable_attention(
            values.value,
            query_term_BQHE,
            index_term_KHE,
            relative_index_BQN,
            self._reference(reference_BQ2, query_term_BQHE),
            values.level_sizes,
            num_points=self.num_points,
            base_size=self.base_size,
            ignore_HD=ignore_HD,
            image_BN=values.image_BN,
            implementation=self.implementation,
        )
        if not values.is_projected:
            out_BQHd = torch.einsum("bqhc,hdc->bqhd", out_BQHd, sampled_weights_HdC)
        return out_BQHd.flatten(2)

    def nothing_seen(self) -> Tensor:
        """What a query without any image gets: (D,)."""
        ignore_V = value_of(self, "ignore_value")
        return self.output_projection(ignore_V.to(self.output_projection.weight.dtype))

    def sampled_weights(self, norm: nn.RMSNorm | nn.LayerNorm | None = None) -> Tensor:
        """What projects sampled features: of each head its rows of the value projection, its bias, and the
        ignore value, in the order of `features_to_sample`: (H, d, C + 2).

        Args:
            norm: whose affine part the features still lack.
        """
        weight_VC, bias_V = self.value_weights(norm)
        ignore_V = self.ignore_value.to(weight_VC.dtype)
        weights = torch.cat([weight_VC, bias_V[:, None], ignore_V[:, None]], dim=-1)
        return weights.unflatten(0, (self.num_heads, -1))

    def value_weights(self, norm: nn.RMSNorm | nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """The value projection with the affine part of the norm before it: (V, C) and (V,)."""
        weight_VC, bias_V = self.value_projection.weight, self.value_projection.bias
        if norm is None:
            return weight_VC, bias_V
        shift_C = getattr(norm, "bias", None)
        if shift_C is not None:
            bias_V = torch.addmv(bias_V, weight_VC, shift_C)
        return weight_VC * norm.weight, bias_V

    def weights_at_hand(self) -> list[Tensor] | None:
        """See `folding.weights_at_hand`."""
        own = weights_at_hand((self,), (FeatureSynchronizer,))
        parts = weights_at_hand(tuple(self.children()), (nn.Linear, PointLinear, nn.Embedding))
        return None if own is None or parts is None else own + parts

    def folded_terms(self, scale_D: Tensor | None = None, shift_D: Tensor | None = None) -> FoldedTerms:
        """See `folding.fold_terms`."""
        weight, bias = self._term_weights()
        query, index = self.query_projection, self.relative_index_embedding
        return fold_terms(
            query.weight, query.bias, index.weight, weight, bias, self.num_heads, scale=scale_D, shift=shift_D
        )

    def _tables(self, values: ImageValues) -> "FoldedTables | None":
        def fold() -> FoldedTables:
            return FoldedTables(self.folded_terms(), None if values.is_projected else self.sampled_weights())

        return folded_tables(self, self, values, self.weights_at_hand(), fold)

    def plan(
        self, query_BQD: Tensor, visible_BQN: Tensor, reference_BQ2: Tensor | None = None
    ) -> SamplingPlan:
        """Where the queries look and how much each place weighs; arguments as `forward`."""
        query_term, index_term = self._terms(query_BQD, visible_BQN.shape[-1])
        return sampling_plan(
            query_term,
            index_term,
            self.checked_index(visible_BQN),
            self._reference(reference_BQ2, query_term),
            num_levels=self.num_levels,
            num_points=self.num_points,
            base_size=self.base_size,
        )

    def _terms(self, query_BQD: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """Offsets and logits from the query alone (B, Q, H, E) and from each relative index alone (K, H, E).

        Linear in the sum of both, so each is projected once instead of once per query and image; of the table
        only the rows that so many images can have.
        """
        index_K = torch.arange(min(self.max_images, num_images + 1), device=query_BQD.device)
        index_KD = self.relative_index_embedding(index_K)
        if self.weights_at_hand() is None:
            query_BQHE = self._offsets_and_logits(self.query_projection(query_BQD), with_bias=True)
            index_KHE = self._offsets_and_logits(index_KD, with_bias=False)
        else:
            weight_eD, bias_e = self._term_weights()
            index_KHE = F.linear(index_KD, weight_eD).unflatten(-1, (self.num_heads, -1))
            if query_BQD.shape[:-1].numel() > len(weight_eD):
                # More queries than terms: it pays to multiply the two matrices first.
                bias_e = torch.addmv(bias_e, weight_eD, self.query_projection.bias)
                query_BQe = F.linear(query_BQD, weight_eD @ self.query_projection.weight, bias_e)
            else:
                query_BQe = F.linear(self.query_projection(query_BQD), weight_eD, bias_e)
            query_BQHE = query_BQe.unflatten(-1, (self.num_heads, -1))
        return _single_or_better(query_BQHE), _single_or_better(index_KHE)

    def _term_weights(self) -> tuple[Tensor, Tensor]:
        """Of offsets and logits, head by head and without what nothing reads: (H * E, D) and (H * E,)."""
        H, L, P = self.num_heads, self.num_levels, self.num_points
        joined = []
        for name in ("weight", "bias"):
            offsets = getattr(self.sampling_offsets, name).unflatten(0, (H, 2 * P))
            logits = getattr(self.attention_logits, name).unflatten(0, (H, L, P + 1))[:, :, :P]
            joined.append(torch.cat([offsets, logits.flatten(1, 2)], dim=1).flatten(0, 1))
        return joined[0], joined[1]

    def _offsets_and_logits(self, x: Tensor, *, with_bias: bool) -> Tensor:
        H, L, P = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(x, with_bias=with_bias)
        logits = self.attention_logits(x, with_bias=with_bias)
        logits = logits.unflatten(-1, (H, L, P + 1))[..., :P].flatten(-2)
        return torch.cat([offsets.unflatten(-1, (H, 2 * P)), logits], dim=-1)

    def _reference(self, reference_BQ2: Tensor | None, term: Tensor) -> Tensor:
        if reference_BQ2 is None:
            return term.new_full((1, 1, 2), CENTRE)
        return reference_BQ2.to(term.dtype)

    def checked_index(self, visible_BQN: Tensor) -> Tensor:
        """See `tokens.visibility.relative_image_index`; refused where it exceeds the table."""
        index = relative_image_index(visible_BQN) if visible_BQN.dtype == torch.bool else visible_BQN
        # The maximum is only read (a device sync) where so many images are there at all.
        # Compiled code sees as many as the pass before it, which read the prompt.
        is_many = index.shape[-1] >= self.max_images and not torch.compiler.is_compiling()
        if is_many and int(index.max()) >= self.max_images:
            raise ValueError(
                f"a query sees {int(index.max())} images, at most {self.max_images - 1} are possible"
            )
        return index


@dataclass(frozen=True, slots=True)
class FoldedTables:
    """`terms`: before sampling. `sampled_weights`: after it, where features are sampled. `gate`: its tanh."""

    terms: FoldedTerms
    sampled_weights: Tensor | None
    gate: float = 1.0


Tables = TypeVar("Tables")


def folded_tables(
    module: nn.Module, key: Any, values: ImageValues, weights: list[Tensor] | None, fold: Callable[[], Tables]
) -> Tables | None:
    """What is kept with the values, if it may be used: all weights are at hand and no gradient shall reach
    them.

    Not in training mode either: there weights change with every step, and checkpointing's first pass must
    compute as its second does.
    """
    if weights is None or values.folded is None or module.training:
        return None
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return None
    return values.folded.get(key, weights, fold)


class LooksBehindNorm(Protocol):
    """A synchronizer and the norm of the features that it looks into."""

    feature_norm: Any
    synchronizer: FeatureSynchronizer


def project_for_all(
    blocks: Sequence[LooksBehindNorm], cells: Tensor, level_sizes: tuple[int, ...]
) -> list[ImageValues]:
    """The same features for each block.

    The norms differ in their affine part alone, which goes into the matrix: so features are normalised once
    for all (performance.md, E3), and where they are kept as they are, kept once for all.
    """
    norms, cores = [block.feature_norm for block in blocks], [block.synchronizer for block in blocks]
    for core in cores:
        core.check_levels(level_sizes)
    are_at_hand = all(core.weights_at_hand() is not None for core in cores) and (
        weights_at_hand(norms, (nn.RMSNorm, nn.LayerNorm)) is not None
    )
    if not are_at_hand or len({(type(norm), norm.eps) for norm in norms}) > 1:
        return [
            core.projected(core.value_projection(norm(cells)), level_sizes)
            for core, norm in zip(cores, norms, strict=True)
        ]
    normed = normalize(norms[0], cells)
    if all(core.keep == "features" for core in cores):
        features = features_to_sample(normed)
        return [unprojected(features, level_sizes) for _ in cores]
    return [
        core.projected(F.linear(normed, *core.value_weights(norm)), level_sizes)
        for core, norm in zip(cores, norms, strict=True)
    ]


def _single_or_better(terms: Tensor) -> Tensor:
    # Coordinates in half precision are off by up to an eighth of a cell on a map of 64.
    return terms.float() if terms.dtype in (torch.float16, torch.bfloat16) else terms


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
        """Project flattened features, see `FeatureSynchronizer.project_values`."""
        return project_for_all([self], cells_BNSC, level_sizes)[0]

    def forward(self, hidden_BTD: Tensor, values: ImageValues, relative_index_BTN: Tensor) -> Tensor:
        """What is added to the residual stream: (B, T, D)."""
        core = self.synchronizer
        if relative_index_BTN.shape[-1] == 0:
            # Called, so that weights which are only there during a call are there.
            return self.gate.tanh() * core(hidden_BTD, values, relative_index_BTN)
        tables = self._tables(values)
        if tables is None:
            weights = None if values.is_projected else core.sampled_weights(self.feature_norm)
            query_BTD = self.query_norm(hidden_BTD)
            return self.gate.tanh() * core(query_BTD, values, relative_index_BTN, None, weights)
        seen_BTV = core.look(
            tables.terms.of(normalize(self.query_norm, hidden_BTD)),
            tables.terms.index,
            core.checked_index(relative_index_BTN),
            values,
            tables.sampled_weights,
        )
        output = core.output_projection
        seen_MV = seen_BTV.flatten(0, 1).to(output.weight.dtype)
        # The gate costs nothing as a factor of the matrix product.
        added_MD = torch.addmm(output.bias, seen_MV, output.weight.t(), beta=tables.gate, alpha=tables.gate)
        return added_MD.view(*hidden_BTD.shape[:-1], -1)

    def plan(self, hidden_BTD: Tensor, relative_index_BTN: Tensor) -> SamplingPlan:
        """Where tokens look; arguments as `forward`."""
        return self.synchronizer.plan(self.query_norm(hidden_BTD), relative_index_BTN)

    def _tables(self, values: ImageValues) -> FoldedTables | None:
        core = self.synchronizer
        if torch.compiler.is_compiling():
            # What the pass before made, which read the prompt and was not compiled.
            return None if values.folded is None or self.training else values.folded.last(self)
        weights = core.weights_at_hand()
        norms = weights_at_hand((self.query_norm, self.feature_norm), (nn.RMSNorm,))
        weights = None if weights is None or norms is None else [*weights, *norms, self.gate]

        def fold() -> FoldedTables:
            return FoldedTables(
                core.folded_terms(self.query_norm.weight),
                None if values.is_projected else core.sampled_weights(self.feature_norm),
                float(self.gate.tanh()),
            )

        return folded_tables(self, self, values, weights, fold)
