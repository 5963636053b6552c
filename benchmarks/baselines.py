"""What ours is compared with: the textbook, on a GPU also compiled and with the best public sampler; the
forms that ours could have had as well.

Letters as in `textbook.py`; R rows of images (several queries' rows may share one), E terms a head, K rows of
the relative-index table.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.deformops_sampler import deformops_sampling, has_deformops
from benchmarks.harness import Setting
from benchmarks.textbook import TextbookGate
from mm_interleaved.models.norms import normalize
from mm_interleaved.models.synchronizer import GatedSynchronizer
from mm_interleaved.ops import SamplingPlan, sampling_plan

COMPILED_IMAGES = 8
"""Compiling takes half a minute for each shape: it is done for one number of images."""


def baselines(setting: Setting, layer: GatedSynchronizer, images: int) -> dict[str, Any]:
    """Modules by name, the plain textbook first; each stands where `layer` stands."""
    sides: dict[str, Any] = {"textbook": TextbookGate(layer)}
    if setting.is_gpu and images == COMPILED_IMAGES:
        sides["textbook, compiled"] = torch.compile(TextbookGate(layer))
    if setting.is_gpu and has_deformops():
        sides["textbook, deformops"] = TextbookGate(layer, deformops_sampling)
    return sides


class DenseGate:
    """A layer that looks nothing up: a matrix of what every cell weighs for every head, times the features.

    Its projections are folded as ours are, and the values are projected after the sum.
    """

    def __init__(self, layer: GatedSynchronizer):
        core = layer.synchronizer
        self.layer, self.terms = layer, core.folded_terms(layer.query_norm.weight)
        self.weights_HdC = core.sampled_weights(layer.feature_norm)

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
