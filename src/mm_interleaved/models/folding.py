"""Shortcuts of the synchronizers: the same function of the same weights, with fewer operations.

`synchronizer.py` and `unet.py` say what is computed. This is how it is computed wherever reading weights is
the same as calling layers (`weights_at_hand.py`). The choice is made by `with_shortcut`, which wraps their
`forward` (and by `project_for_all`, for several layers at once): a shortcut that returns None leaves the work
to what it wraps, as under LoRA, quantisation, offloading and sharding.

1. All before sampling is linear in the query and in the embedding of its relative index, so two matrices
   become one, once an image or once a call: offsets and logits = W (D q + d + r_k) + b = M q + c + T_k, with
   M = W D, c = W d + b, T = R W^T. A norm's scale and a position table fold as well; after sampling, a gate
   or a convolution.
2. Sampling is linear too, so features may be sampled first and projected afterwards; all layers then
   share one copy of the features (`keep="features"`).
3. Norms of features differ in their affine part alone, which goes into the value projection, so features are
   normalised once for all layers.
4. Where no image is visible the result is a constant.
What is folded is kept with the projected images it is used with (`ImageValues.folded`), and made anew when a
weight has changed. In training, weights change with every step: nothing is kept.
Letters: B rows, Q queries (pixels, in a U-Net), N images, H heads, E = 2 P + L P terms a head (see
`ops.attention`), S cells an image, C feature channels, D query channels, V value channels, d channels a head
(V / H), K rows of the relative-index table, I images being denoised, X channels of their map, y and x its
rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved.models.image_values import ImageValues, check_levels
from mm_interleaved.models.linear import OptionalBiasLinear
from mm_interleaved.models.norms import normalize
from mm_interleaved.models.offloading import value_of
from mm_interleaved.models.positions import pixel_centres, resize_grid_table
from mm_interleaved.models.sampling_terms import Terms, checked_relative_index, sampling_terms
from mm_interleaved.models.weights_at_hand import FoldingCache, weights_at_hand

Core = Any
"""A `FeatureSynchronizer`; this and the next two import this file, so they cannot be named here."""
GatedBlock = Any
"""A `GatedSynchronizer`."""
MapBlock = Any
"""A `MapSynchronizer`."""

# ---- The choice ----------------------------------------------------------------------------------------

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Method = Callable[Concatenate[Any, Arguments], Result]


def with_shortcut(
    shortcut: Callable[Concatenate[Any, Arguments], Result | None],
) -> Callable[[Method[Arguments, Result]], Method[Arguments, Result]]:
    """A method decorator: what `shortcut` returns, or what the method does where that is None.

    Args:
        shortcut: takes what the method takes.
    """

    def decorate(plain: Method[Arguments, Result]) -> Method[Arguments, Result]:
        @wraps(plain)
        def chosen(self: Any, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            found = shortcut(self, *arguments, **named)
            return plain(self, *arguments, **named) if found is None else found

        # Read by `core_weights`: who overrides the method has no shortcut.
        vars(chosen)["shortcut"] = shortcut
        return chosen

    return decorate


def core_weights(core: Core, device: torch.device) -> list[Tensor] | None:
    """See `weights_at_hand`: of a `FeatureSynchronizer` and its layers."""
    # A subclass with a `forward` of its own computes what is not known here.
    if getattr(type(core).forward, "shortcut", None) is not attend:
        return None
    own = weights_at_hand((core,), (type(core),), device)
    parts = weights_at_hand(tuple(core.children()), (nn.Linear, OptionalBiasLinear, nn.Embedding), device)
    return None if own is None or parts is None else own + parts


# ---- What is kept --------------------------------------------------------------------------------------


Tables = TypeVar("Tables")


def kept_tables(
    module: nn.Module,
    key: Any,
    values: ImageValues,
    weights: Callable[[], list[Tensor] | None],
    fold: Callable[[], Tables],
) -> Tables | None:
    """What is kept with the values, if it may be used: all weights are at hand and no gradient shall reach
    them.

    Not in training mode either: there weights change with every step, and checkpointing's first pass must
    compute as its second does.
    """
    if values.folded is None or module.training:
        return None
    if torch.compiler.is_compiling():
        # What the pass before made, which read the prompt and was not compiled.
        return values.folded.last(key)
    found = weights()
    if found is None or (torch.is_grad_enabled() and any(weight.requires_grad for weight in found)):
        return None
    return values.folded.get(key, found, fold)


# ---- 1. Matrices multiplied together -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoldedTerms:
    """Offsets and logits straight from a query: `weight` (H * E, D), `bias` (H * E,) or (Q, H * E) with a
    position table, `index` (K, H, E).
    """

    weight: Tensor
    bias: Tensor
    index: Tensor

    def of(self, query_BQD: Tensor) -> Tensor:
        """(B, Q, H, E), single precision or better."""
        if self.bias.ndim == 1 and self.bias.dtype == query_BQD.dtype:
            term = F.linear(query_BQD, self.weight, self.bias).to(self.bias.dtype)
        else:
            term = F.linear(query_BQD, self.weight).to(self.bias.dtype) + self.bias
        return term.unflatten(-1, self.index.shape[1:])


def fold_terms(core: Core, scale_D: Tensor | None = None, shift_D: Tensor | None = None) -> FoldedTerms:
    """M, c and T of a `FeatureSynchronizer`, folded in single precision or better; M is kept in the precision
    of the weights.

    Args:
        scale_D, shift_D: the query is `scale * x + shift` of what will be given; shift (D,) or (Q, D).
    """
    query = core.query_projection
    exact = torch.promote_types(query.weight.dtype, torch.float32)
    term_weight, term_bias = (part.to(exact) for part in term_layer(core))
    weight = term_weight @ query.weight.to(exact)
    bias = torch.addmv(term_bias, term_weight, query.bias.to(exact))
    index = F.linear(core.relative_index_embedding.weight.to(exact), term_weight)
    if shift_D is not None:
        bias = bias + F.linear(shift_D.to(exact), weight)
    if scale_D is not None:
        weight = weight * scale_D.to(exact)
    return FoldedTerms(weight.to(query.weight.dtype), bias, index.unflatten(-1, (core.num_heads, -1)))


def term_layer(core: Core) -> tuple[Tensor, Tensor]:
    """W and b, of offsets and logits head by head and without what nothing reads: (H * E, D), (H * E,)."""
    H, L, P = core.num_heads, core.num_levels, core.num_points
    joined: list[Tensor] = []
    for name in ("weight", "bias"):
        offsets = getattr(core.sampling_offsets, name).unflatten(0, (H, 2 * P))
        logits = getattr(core.attention_logits, name).unflatten(0, (H, L, P + 1))[:, :, :P]
        joined.append(torch.cat([offsets, logits.flatten(1, 2)], dim=1).flatten(0, 1))
    return joined[0], joined[1]


def terms_now(core: Core, query_BQD: Tensor, index_BQN: Tensor, reference_BQ2: Tensor | None) -> Terms:
    """`FeatureSynchronizer.terms` with one matrix instead of two or three; gradients reach all of them."""
    index_K = torch.arange(min(core.max_images, index_BQN.shape[-1] + 1), device=query_BQD.device)
    weight_eD, bias_e = term_layer(core)
    index_Ke = F.linear(core.relative_index_embedding(index_K), weight_eD)
    if query_BQD.shape[:-1].numel() > len(weight_eD):
        # More queries than terms: it pays to multiply the two matrices first.
        bias_e = torch.addmv(bias_e, weight_eD, core.query_projection.bias)
        query_BQe = F.linear(query_BQD, weight_eD @ core.query_projection.weight, bias_e)
    else:
        query_BQe = F.linear(core.query_projection(query_BQD), weight_eD, bias_e)
    by_head = (core.num_heads, -1)
    return sampling_terms(
        query_BQe.unflatten(-1, by_head), index_Ke.unflatten(-1, by_head), index_BQN, reference_BQ2
    )


def _fold_linear(first: nn.Linear, second_weight: Tensor, second_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `second(first(x))`."""
    exact = torch.promote_types(first.weight.dtype, torch.float32)
    second = second_weight.to(exact)
    weight = second @ first.weight.to(exact)
    bias = torch.addmv(second_bias.to(exact), second, first.bias.to(exact))
    return weight.to(first.weight.dtype), bias.to(first.weight.dtype)


# ---- 2. and 3. Features sampled before they are projected, and normalised once for all ------------------


def features_to_sample(cells: Tensor) -> Tensor:
    """Features (..., S, C) with two more channels, for one head that stands for all: (..., S, 1, C + 2).

    Sampling is linear, so it may come before the projection: `W sum(w_j x_j) + b m`. The sample of a channel
    of ones is m, the weight that falls onto the map: not the sum of all weights, since projected values are
    zero outside the map, bias included. The last channel is filled by looking nowhere alone.
    """
    one, zero = torch.ones_like(cells[..., :1]), torch.zeros_like(cells[..., :1])
    return torch.cat([cells, one, zero], dim=-1).unsqueeze(-2)


def sampled_weights(core: Core, norm: nn.RMSNorm | nn.LayerNorm | None = None) -> Tensor:
    """What projects sampled features: of each head its rows of the value projection, its bias, and the ignore
    value, in the order of `features_to_sample`: (H, d, C + 2).

    Args:
        norm: whose affine part the features still lack.
    """
    weight_VC, bias_V = _value_layer(core, norm)
    ignore_V = core.ignore_value.to(weight_VC.dtype)
    weights = torch.cat([weight_VC, bias_V[:, None], ignore_V[:, None]], dim=-1)
    return weights.unflatten(0, (core.num_heads, -1))


def _value_layer(core: Core, norm: nn.RMSNorm | nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """The value projection with the affine part of the norm before it: (V, C) and (V,)."""
    weight_VC, bias_V = core.value_projection.weight, core.value_projection.bias
    if norm is None:
        return weight_VC, bias_V
    shift_C = getattr(norm, "bias", None)
    if shift_C is not None:
        bias_V = torch.addmv(bias_V, weight_VC, shift_C)
    return weight_VC * norm.weight, bias_V


def _sample(core: Core, values: ImageValues, terms: Terms, sampled_weights_HdC: Tensor | None) -> Tensor:
    """`FeatureSynchronizer.sample`, of features as of values: (B, Q, V)."""
    if values.is_projected:
        return core.sample(values, *terms)
    last_channel = torch.arange(values.value.shape[-1], device=values.value.device)
    nowhere_C = (last_channel == last_channel[-1]).to(values.value.dtype)
    seen_BQc = core.sample(values, *terms, ignore_HD=nowhere_C.expand(core.num_heads, -1))
    seen_BQHC = seen_BQc.unflatten(-1, (core.num_heads, -1))
    return torch.einsum("bqhc,hdc->bqhd", seen_BQHC, sampled_weights_HdC).flatten(2)


def keep_features(core: Core, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues | None:
    """Stands in for `FeatureSynchronizer.project_cells` where features are kept instead of values."""
    if core.keep != "features" or core_weights(core, cells_BNSC.device) is None:
        return None
    check_levels(level_sizes, core.num_levels)
    return _unprojected(features_to_sample(cells_BNSC), level_sizes)


def _unprojected(features: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
    return ImageValues(features, level_sizes, is_projected=False, folded=FoldingCache())


class AttendsBehindNorm(Protocol):
    """A synchronizer and the norm of the features that it attends to."""

    feature_norm: Any
    synchronizer: Any


def project_for_all(
    blocks: Sequence[AttendsBehindNorm], cells: Tensor, level_sizes: tuple[int, ...]
) -> list[ImageValues]:
    """The same features (..., S, C), normalised and projected for each block."""
    norms, cores = [block.feature_norm for block in blocks], [block.synchronizer for block in blocks]
    are_at_hand = all(core_weights(core, cells.device) is not None for core in cores) and (
        weights_at_hand(norms, (nn.RMSNorm, nn.LayerNorm), cells.device) is not None
    )
    if not are_at_hand or len({(type(norm), norm.eps) for norm in norms}) > 1:
        return [
            core.projected(core.value_projection(norm(cells)), level_sizes)
            for core, norm in zip(cores, norms, strict=True)
        ]
    normed = normalize(norms[0], cells)
    if all(core.keep == "features" for core in cores):
        for core in cores:
            check_levels(level_sizes, core.num_levels)
        features = features_to_sample(normed)
        return [_unprojected(features, level_sizes) for _ in cores]
    return [
        core.projected(F.linear(normed, *_value_layer(core, norm)), level_sizes)
        for core, norm in zip(cores, norms, strict=True)
    ]


# ---- The shortcuts: of the synchronizer alone, in a language model's layer, behind a map of a U-Net ------


def nothing_visible(core: Core) -> Tensor:
    """What a query gets that sees no image: (D,)."""
    ignore_V = value_of(core, "ignore_value")
    return core.output_projection(ignore_V.to(core.output_projection.weight.dtype))


@dataclass(frozen=True, slots=True)
class FoldedLayer:
    """`terms`: before sampling. `sampled_weights`: after it, where features are sampled. `gate`: its tanh."""

    terms: FoldedTerms
    sampled_weights: Tensor | None
    gate: float = 1.0


def attend(
    core: Core,
    query_BQD: Tensor,
    values: ImageValues,
    visible_BQN: Tensor,
    reference_BQ2: Tensor | None = None,
) -> Tensor | None:
    """Stands in for `FeatureSynchronizer.forward`."""
    index_BQN = checked_relative_index(visible_BQN, core.max_images)
    if index_BQN.shape[-1] == 0:
        return nothing_visible(core).expand(*query_BQD.shape[:-1], -1)

    def fold() -> FoldedLayer:
        return FoldedLayer(fold_terms(core), None if values.is_projected else sampled_weights(core))

    tables = kept_tables(core, core, values, lambda: core_weights(core, query_BQD.device), fold)
    if tables is None:
        return _attend_now(core, query_BQD, values, index_BQN, reference_BQ2)
    query_BQHE = tables.terms.of(query_BQD)
    terms = sampling_terms(query_BQHE, tables.terms.index, index_BQN, reference_BQ2)
    seen_BQV = _sample(core, values, terms, tables.sampled_weights)
    return core.output_projection(seen_BQV.to(core.output_projection.weight.dtype))


def _attend_now(
    core: Core,
    query_BQD: Tensor,
    values: ImageValues,
    index_BQN: Tensor,
    reference_BQ2: Tensor | None = None,
    norm: nn.RMSNorm | nn.LayerNorm | None = None,
) -> Tensor | None:
    """The same with nothing kept, as in training; None where that is what the synchronizer does itself.

    Args:
        norm: whose affine part kept features still lack.
    """
    is_at_hand = core_weights(core, query_BQD.device) is not None
    if values.is_projected and not is_at_hand:
        return None
    arguments = query_BQD, index_BQN, reference_BQ2
    # Not at hand with features: something came around the layers after features were kept.
    terms = terms_now(core, *arguments) if is_at_hand else core.terms(*arguments)
    weights_HdC = None if values.is_projected else sampled_weights(core, norm)
    seen_BQV = _sample(core, values, terms, weights_HdC)
    return core.output_projection(seen_BQV.to(core.output_projection.weight.dtype))


def attend_gated(
    block: GatedBlock, hidden_BTD: Tensor, values: ImageValues, relative_index_BTN: Tensor
) -> Tensor | None:
    """Stands in for `GatedSynchronizer.forward`: the gate and both norms are folded as well."""
    core = block.synchronizer
    if relative_index_BTN.shape[-1] == 0:
        # Called, so that weights which are only there during a call are there.
        return block.gate.tanh() * core(hidden_BTD, values, relative_index_BTN)

    def weights() -> list[Tensor] | None:
        device = hidden_BTD.device
        of_core = core_weights(core, device)
        of_norms = weights_at_hand((block.query_norm, block.feature_norm), (nn.RMSNorm,), device)
        return None if of_core is None or of_norms is None else [*of_core, *of_norms, block.gate]

    def fold() -> FoldedLayer:
        return FoldedLayer(
            fold_terms(core, block.query_norm.weight),
            None if values.is_projected else sampled_weights(core, block.feature_norm),
            # On the meta device any number will do.
            1.0 if block.gate.is_meta else float(block.gate.tanh()),
        )

    tables = kept_tables(block, block, values, weights, fold)
    if tables is None:
        if values.is_projected:
            return None
        query_BTD = block.query_norm(hidden_BTD)
        index_BTN = checked_relative_index(relative_index_BTN, core.max_images)
        added_BTD = _attend_now(core, query_BTD, values, index_BTN, norm=block.feature_norm)
        assert added_BTD is not None, "features that were kept are projected here"
        return block.gate.tanh() * added_BTD
    index_BTN = checked_relative_index(relative_index_BTN, core.max_images)
    query_BTHE = tables.terms.of(normalize(block.query_norm, hidden_BTD))
    terms = sampling_terms(query_BTHE, tables.terms.index, index_BTN)
    seen_BTV = _sample(core, values, terms, tables.sampled_weights)
    output = core.output_projection
    seen_MV = seen_BTV.flatten(0, 1).to(output.weight.dtype)
    # The gate costs nothing as a factor of the matrix product.
    added_MD = torch.addmm(output.bias, seen_MV, output.weight.t(), beta=tables.gate, alpha=tables.gate)
    return added_MD.view(*hidden_BTD.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class FoldedMap:
    """`terms`: before sampling, for one size of the map; its bias holds the position table. `weight`, `bias`:
    output projection and convolution in one. `sampled_weights`: between them, where features are sampled.
    `centres`: of the pixels, see `pixel_centres`.
    """

    terms: FoldedTerms
    centres: Tensor
    weight: Tensor
    bias: Tensor
    sampled_weights: Tensor | None


def attend_from_map(
    block: MapBlock, map_IXyx: Tensor, values: ImageValues, relative_index_IK: Tensor
) -> Tensor | None:
    """Stands in for `MapSynchronizer.forward`: norms, position table and convolution are folded as well."""
    core, (height, width) = block.synchronizer, map_IXyx.shape[-2:]
    if relative_index_IK.shape[-1] == 0:
        return block.conv(nothing_visible(core)[None, :, None, None]).expand_as(map_IXyx)

    def weights() -> list[Tensor] | None:
        device = map_IXyx.device
        of_core = core_weights(core, device)
        parts = (block.query_norm, block.feature_norm, block.conv)
        of_parts = weights_at_hand(parts, (nn.LayerNorm, nn.Conv2d), device)
        return None if of_core is None or of_parts is None else [*of_core, *of_parts, block.position_table]

    def fold() -> FoldedMap:
        table_QX = resize_grid_table(block.position_table, (height, width))
        terms = fold_terms(core, block.query_norm.weight, block.query_norm.bias + table_QX)
        assert block.conv.bias is not None
        weight, bias = _fold_linear(core.output_projection, block.conv.weight.flatten(1), block.conv.bias)
        sampled = None if values.is_projected else sampled_weights(core, block.feature_norm)
        return FoldedMap(terms, pixel_centres(height, width, map_IXyx), weight, bias, sampled)

    tables = kept_tables(block, (block, height, width, map_IXyx.dtype), values, weights, fold)
    if tables is None:
        if values.is_projected:
            return None
        query_IQX, index_IQK, centres_1Q2 = block.queries(map_IXyx, relative_index_IK)
        index_IQK = checked_relative_index(index_IQK, core.max_images)
        seen_IQX = _attend_now(core, query_IQX, values, index_IQK, centres_1Q2, block.feature_norm)
        assert seen_IQX is not None, "features that were kept are projected here"
        return block.conv(seen_IQX.transpose(1, 2).unflatten(2, (height, width)))
    index_IQK = relative_index_IK[:, None].expand(-1, height * width, -1)
    index_IQK = checked_relative_index(index_IQK, core.max_images)
    query_IQHE = tables.terms.of(normalize(block.query_norm, map_IXyx.flatten(2).transpose(1, 2)))
    terms = sampling_terms(query_IQHE, tables.terms.index, index_IQK, tables.centres)
    seen_IQV = _sample(core, values, terms, tables.sampled_weights)
    added_IQX = F.linear(seen_IQV.to(tables.weight.dtype), tables.weight, tables.bias)
    return added_IQX.transpose(1, 2).unflatten(2, (height, width))
