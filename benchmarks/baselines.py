"""What ours is compared with: the textbook, on a GPU also compiled and with the best public sampler; the
forms that ours could have had as well.

Letters as in `textbook.py`; R rows of images (several queries' rows may share one), E terms a head, K rows of
the relative-index table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.deformops_sampler import deformops_sampling, has_deformops
from benchmarks.harness import Setting, compiled
from benchmarks.textbook import TextbookGate
from mm_interleaved.models.folding import FoldedTerms, fold_terms, sampled_weights
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.norms import normalize
from mm_interleaved.ops import (
    SamplingPlan,
    deformable_sampling,
    multi_image_deformable_attention,
    sampling_plan,
)

COMPILED_IMAGES = 8
"""Compiling takes half a minute for each shape: it is done for one number of images."""


def baselines(setting: Setting, layer: GatedSynchronizer, images: int) -> dict[str, Any]:
    """Modules by name, the plain textbook first; each stands where `layer` stands."""
    sides: dict[str, Any] = {"textbook": TextbookGate(layer)}
    if setting.compiles and images == COMPILED_IMAGES:
        sides["textbook, compiled"] = compiled(TextbookGate(layer))
    if setting.is_gpu and has_deformops():
        sides["textbook, deformops"] = TextbookGate(layer, deformops_sampling)
    return sides


Terms = Callable[[GatedSynchronizer, Tensor], tuple[Tensor, Tensor]]
"""Of a layer and hidden states (B, Q, D): offsets and logits of the queries and of the relative indices."""


def once_a_query(layer: GatedSynchronizer, hidden_BQD: Tensor) -> tuple[Tensor, Tensor]:
    """The projections one after another, each once for every query: (B, Q, H, E) and (K, H, E)."""
    core = layer.synchronizer
    H, L, P = core.num_heads, core.num_levels, core.num_points

    def offsets_and_logits(x: Tensor, *, with_bias: bool) -> Tensor:
        offsets = core.sampling_offsets(x, with_bias=with_bias).unflatten(-1, (H, 2 * P))
        logits = core.attention_logits(x, with_bias=with_bias).unflatten(-1, (H, L, P + 1))
        terms = torch.cat([offsets, logits[..., :P].flatten(-2)], dim=-1)
        return terms.to(torch.promote_types(terms.dtype, torch.float32))

    query_BQD = core.query_projection(layer.query_norm(hidden_BQD))
    index_KHE = offsets_and_logits(core.relative_index_embedding.weight, with_bias=False)
    return offsets_and_logits(query_BQD, with_bias=True), index_KHE


def folded_now(layer: GatedSynchronizer, hidden_BQD: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices multiplied first, so that queries are multiplied once; gradients reach both."""
    return _of_folded(fold(layer), layer, hidden_BQD)


def folded_before(folded: FoldedTerms) -> Terms:
    """The same with what was folded earlier, see `fold`."""
    return lambda layer, hidden_BQD: _of_folded(folded, layer, hidden_BQD)


def fold(layer: GatedSynchronizer) -> FoldedTerms:
    return fold_terms(layer.synchronizer, layer.query_norm.weight)


def _of_folded(folded: FoldedTerms, layer: GatedSynchronizer, hidden_BQD: Tensor) -> tuple[Tensor, Tensor]:
    return folded.of(normalize(layer.query_norm, hidden_BQD)), folded.index


@dataclass(frozen=True, slots=True)
class Rung:
    """Our layer with some of what it leaves out put back; called as the layer is."""

    layer: GatedSynchronizer
    terms: Terms
    samples_hidden: bool
    """Whether pairs of a query and an image hidden from it are sampled too, and weigh nothing. These samples
    are taken by PyTorch's bags, on a GPU as well."""

    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        return self.layer.project_cells(cells_BNSC, level_sizes)

    def __call__(self, hidden_BQD: Tensor, values: ImageValues, relative_index_BQN: Tensor) -> Tensor:
        """What is added to the residual stream: (B, Q, D)."""
        core = self.layer.synchronizer
        attend = _attend_to_all_pairs if self.samples_hidden else multi_image_deformable_attention
        query_term, index_term = self.terms(self.layer, hidden_BQD)
        seen_BQHd = attend(
            values.value,
            query_term,
            index_term,
            relative_index_BQN,
            query_term.new_full((1, 1, 2), 0.5),
            values.level_sizes,
            num_points=core.num_points,
            base_size=core.base_size,
            ignore_HD=core.ignore_value.view(core.num_heads, -1),
        )
        return self.layer.gate.tanh() * core.output_projection(seen_BQHd.flatten(2))


def _attend_to_all_pairs(
    value_BNSHd: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: tuple[int, ...],
    *,
    num_points: int,
    base_size: float,
    ignore_HD: Tensor,
) -> Tensor:
    """`multi_image_deformable_attention` in two steps, over all pairs."""
    plan = sampling_plan(
        query_term_BQHE,
        index_term_KHE,
        relative_index_BQN,
        reference_BQ2,
        num_levels=len(level_sizes),
        num_points=num_points,
        base_size=base_size,
    )
    N = relative_index_BQN.shape[-1]
    seen_BQHd = deformable_sampling(
        value_BNSHd.flatten(1, 2), level_sizes * N, plan.location, plan.weight, implementation="gather"
    )
    return seen_BQHd + plan.ignore[..., None].to(seen_BQHd.dtype) * ignore_HD


class DenseGate:
    """A layer that samples nothing: a matrix of what every cell weighs for every head, times the features.

    Its projections are folded as ours are, and the values are projected after the sum.
    """

    def __init__(self, layer: GatedSynchronizer):
        core = layer.synchronizer
        self.layer, self.terms = layer, fold(layer)
        self.weights_HdC = sampled_weights(core, layer.feature_norm)

    def __call__(
        self,
        hidden_BQD: Tensor,
        features_RNSC: Tensor,
        relative_index_BQN: Tensor,
        level_sizes: Sequence[int],
    ) -> Tensor:
        """What is added to the residual stream: (B, Q, D).

        Args:
            features_RNSC: normalised, without the norm's scale; B is a multiple of R.
        """
        core, terms = self.layer.synchronizer, self.terms
        query_term_BQHE = terms.of(normalize(self.layer.query_norm, hidden_BQD))
        plan = sampling_plan(
            query_term_BQHE,
            terms.index,
            relative_index_BQN,
            query_term_BQHE.new_full((1, 1, 2), 0.5),
            num_levels=core.num_levels,
            num_points=core.num_points,
            base_size=core.base_size,
        )
        weight_BQHNS = cell_weights(plan, level_sizes)
        # Queries of rows that share images are further rows of one matrix.
        matrix_Rxc = (
            weight_BQHNS.flatten(3)
            .to(features_RNSC.dtype)
            .view(len(features_RNSC), -1, features_RNSC.shape[1:3].numel())
        )
        seen_RxC = matrix_Rxc @ features_RNSC.flatten(1, 2)
        seen_BQHC = seen_RxC.view(*plan.ignore.shape, -1)
        # Zero padding falls away by itself: the sum over the cells is what the bias is weighed with.
        mass_BQH2 = torch.stack([weight_BQHNS.sum((-1, -2)), plan.ignore], dim=-1)
        seen_BQHC = torch.cat([seen_BQHC, mass_BQH2.to(seen_BQHC.dtype)], dim=-1)
        seen_BQHd = torch.einsum("bqhc,hdc->bqhd", seen_BQHC, self.weights_HdC)
        return self.layer.gate.tanh() * core.output_projection(seen_BQHd.flatten(2))


def cell_weights(plan: SamplingPlan, level_sizes: Sequence[int]) -> Tensor:
    """What each cell of each image weighs for each query: (B, Q, H, N, S).

    A bilinear sample is a hat over the columns times a hat over the rows.
    """
    cells = []
    for level, size in enumerate(level_sizes):
        place_BQHNP2 = plan.location[:, :, :, level :: len(level_sizes)] * size - 0.5
        cell_s = torch.arange(size, device=place_BQHNP2.device)
        hat_BQHNP2s = (1 - (place_BQHNP2[..., None] - cell_s).abs()).clamp(min=0)
        column, row = hat_BQHNP2s.unbind(-2)
        weight_BQHNP = plan.weight[:, :, :, level :: len(level_sizes)]
        cells.append(torch.einsum("bqhnpy,bqhnpx->bqhnyx", row * weight_BQHNP[..., None], column).flatten(-2))
    return torch.cat(cells, dim=-1)
