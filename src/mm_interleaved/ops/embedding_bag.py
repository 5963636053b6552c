"""Embedding bags, weighted sums of table rows, and their two gradients: `embedding_bag` without its backward.

Stock PyTorch sorts 64-bit numbers and adds row by row to get the table's gradient. Here the transposed bags
are formed by one radix sort of 32-bit row numbers and summed by `embedding_bag` itself, whose loop is by far
the faster: 256 queries, 16 heads of 64 channels, 96 rows a bag, float32, one core: 6.3 ms against 22.9, and
2.5 against 7.3 for the weights (2026-11).
Letters: b bags, j rows a bag, R rows of the table, D channels.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F


def sum_embedding_bags(table_RD: Tensor, row_bj: Tensor, weight_bj: Tensor) -> Tensor:
    """Each bag's weighted sum of rows, (b, D), in the dtype of the table."""
    return F.embedding_bag(row_bj, table_RD, mode="sum", per_sample_weights=weight_bj.to(table_RD.dtype))


def weight_gradients(gradient_bD: Tensor, table_RD: Tensor, row_bj: Tensor) -> Tensor:
    """Of the weights of `sum_embedding_bags`, (b, j): the product of each row with its bag's gradient."""
    bags, per_bag = row_bj.shape
    if table_RD.device.type != "cpu" or table_RD.shape[1] == 0:
        weight = torch.zeros(row_bj.shape, dtype=table_RD.dtype, device=row_bj.device, requires_grad=True)
        with torch.enable_grad():
            out = F.embedding_bag(row_bj, table_RD, mode="sum", per_sample_weights=weight)
        return torch.autograd.grad(out, weight, gradient_bD)[0]
    first_b = torch.arange(0, row_bj.numel() + 1, per_bag, dtype=row_bj.dtype)
    with warnings.catch_warnings():
        # "Sparse CSR is in beta state", once a process; nothing but this product is asked of it.
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            first_b,
            row_bj.reshape(-1),
            # Multiplied by `beta` all the same, so it must hold numbers.
            gradient_bD.new_zeros(row_bj.numel()),
            size=(bags, len(table_RD)),
            check_invariants=False,
        )
        products = torch.sparse.sampled_addmm(pattern, gradient_bD, table_RD.t(), beta=0.0)
    return products.values().view(bags, per_bag)


def table_gradient(gradient_bD: Tensor, num_rows: int, row_bj: Tensor, weight_bj: Tensor) -> Tensor:
    """Of the table of `sum_embedding_bags`: (R, D)."""
    row, order = row_bj.flatten().sort(stable=True)
    end_R = torch.bincount(row, minlength=num_rows).cumsum(0)
    bag = torch.div(order.to(row_bj.dtype), row_bj.shape[1], rounding_mode="floor")
    return F.embedding_bag(
        bag,
        gradient_bD,
        F.pad(end_R, (1, 0)).to(row_bj.dtype),
        mode="sum",
        per_sample_weights=weight_bj.flatten()[order],
        include_last_offset=True,
    )
