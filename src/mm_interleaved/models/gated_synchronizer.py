"""The synchronizer inside a language-model layer, between self-attention and feed-forward.

Letters: B rows, T tokens, N images, S cells an image, C feature channels, D hidden channels.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mm_interleaved.models.folding import attend_gated, project_for_all, with_shortcut
from mm_interleaved.models.image_values import ImageValues
from mm_interleaved.models.synchronizer import FeatureSynchronizer, plan_of
from mm_interleaved.ops import SamplingPlan


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
        """Close the gate."""
        init.zeros_(self.gate)

    def project_cells(self, cells_BNSC: Tensor, level_sizes: tuple[int, ...]) -> ImageValues:
        """Normalise and project flattened features, see `FeatureSynchronizer.project_values`."""
        return project_for_all([self], cells_BNSC, level_sizes)[0]

    @with_shortcut(attend_gated)
    def forward(self, hidden_BTD: Tensor, values: ImageValues, relative_index_BTN: Tensor) -> Tensor:
        """What is added to the residual stream: (B, T, D)."""
        return self.gate.tanh() * self.synchronizer(self.query_norm(hidden_BTD), values, relative_index_BTN)

    def plan(self, hidden_BTD: Tensor, relative_index_BTN: Tensor) -> SamplingPlan:
        """Where tokens look; arguments as `forward`."""
        return plan_of(self.synchronizer, self.query_norm(hidden_BTD), relative_index_BTN)
