"""The resampler: learned queries read any number of tokens into a fixed number (Q-Former, arXiv 2301.12597).

Used twice: image tokens to the slots of the language model, and hidden states to the U-Net's conditioning.
Letters: B rows, Q queries, T tokens, D hidden channels, C token channels, H heads, d channels a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

# BERT's constant, which the Q-Former inherits; the released checkpoint was trained with it.
NORM_EPS = 1e-12


class ResamplerAttention(nn.Module):
    """Multi-head attention with the residual and post-norm of BERT, queries and keys perhaps normed."""

    def __init__(self, dim: int, token_dim: int, *, num_heads: int, query_key_norm: bool, dropout: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"resampler width {dim} must be a multiple of its {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(token_dim, dim)
        self.value = nn.Linear(token_dim, dim)
        # One norm for all heads: it normalises each head's own channels.
        self.query_norm = nn.LayerNorm(dim // num_heads, eps=NORM_EPS) if query_key_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(dim // num_heads, eps=NORM_EPS) if query_key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, hidden_BQD: Tensor, token_BTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        query_BHQd = self.query_norm(self._heads(self.query(hidden_BQD)))
        key_BHTd = self.key_norm(self._heads(self.key(token_BTC)))
        value_BHTd = self._heads(self.value(token_BTC))
        if query_BHQd.shape[0] != key_BHTd.shape[0]:
            query_BHQd = query_BHQd.expand(key_BHTd.shape[0], -1, -1, -1)
        seen_BHQd = F.scaled_dot_product_attention(
            query_BHQd,
            key_BHTd,
            value_BHTd,
            attn_mask=None if mask_BT is None else mask_BT[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out_BQD = F.dropout(self.output(seen_BHQd.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return self.norm(hidden_BQD + out_BQD)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ResamplerLayer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; each followed by residual and norm."""

    def __init__(
        self,
        dim: int,
        token_dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        has_cross_attention: bool,
        query_key_norm: bool,
        dropout: float,
    ):
        super().__init__()
        options: dict[str, Any] = {
            "num_heads": num_heads,
            "query_key_norm": query_key_norm,
            "dropout": dropout,
        }
        self.dropout = dropout
        self.self_attention = ResamplerAttention(dim, dim, **options)
        self.cross_attention = ResamplerAttention(dim, token_dim, **options) if has_cross_attention else None
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, hidden_BQD: Tensor, token_BTC: Tensor, mask_BT: Tensor | None) -> Tensor:
        hidden_BQD = self.self_attention(hidden_BQD, hidden_BQD)
        if self.cross_attention is not None:
            hidden_BQD = self.cross_attention(hidden_BQD, token_BTC, mask_BT)
        mlp_BQD = F.dropout(self.fc2(F.gelu(self.fc1(hidden_BQD))), self.dropout, self.training)
        return self.norm(hidden_BQD + mlp_BQD)


class Resampler(nn.Module):
    """Reads tokens (B, T, C) into `num_queries` vectors of `dim` channels.

    Args:
        cross_attention_every: cross-attention stands in layers 0, k, 2k, ...
        query_key_norm: normalise queries and keys of each head (the visual resampler of the paper does).
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        *,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        cross_attention_every: int = 1,
        query_key_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.query_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            ResamplerLayer(
                dim,
                token_dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                has_cross_attention=i % cross_attention_every == 0,
                query_key_norm=query_key_norm,
                dropout=dropout,
            )
            for i in range(num_layers)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Queries and all linear layers start normal with deviation 0.02 (BERT)."""
        init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=0.02)
                init.zeros_(module.bias)

    def forward(self, token_BTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """What the queries read: (B, Q, D). `mask_BT`: bool, True = may be read, at least one a row."""
        # The queries stay one row, shared by all, until the first cross-attention makes them differ.
        hidden_BQD = self.query_dropout(self.query_norm(self.queries))
        for layer in self.layers:
            hidden_BQD = layer(hidden_BQD, token_BTC, mask_BT)
        return hidden_BQD
