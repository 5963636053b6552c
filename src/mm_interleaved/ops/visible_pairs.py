"""Which query sees which image: the visible pairs, and the softmax over the pairs of a query.

Letters: M visible pairs, q queries of all rows; the others as in `attention.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class VisiblePairs(NamedTuple):
    """All pairs, image after image, and of an image query after query, each (M,) int64.

    `query`: which of the B * Q queries. `image`: which of the J images. `relative`: row of the relative-index
    table. `are_queries`: whether they are the queries in their order, each with the one image there is (a
    image generated after one other): then nothing has to be looked up, or summed up, by query.
    """

    query: Tensor
    image: Tensor
    relative: Tensor
    are_queries: bool = False

    def rows(self, table: Tensor, portion: slice) -> Tensor:
        """The rows (q, ...) of the queries of some pairs, (n, ...)."""
        return table[portion] if self.are_queries else table.index_select(0, self.query[portion])

    def add(self, total: Tensor, portion: slice, part: Tensor) -> None:
        """Add what belongs to some pairs, (n, ...), to their queries' rows, (q, ...)."""
        if self.are_queries:
            total[portion] += part
        else:
            total.index_add_(0, self.query[portion], part)


def visible_pairs(relative_index_BQN: Tensor, image_BN: Tensor) -> VisiblePairs:
    """Packed documents pay for their own images alone. Costs one synchronisation with the device."""
    row_M, place_M, query_M = relative_index_BQN.transpose(1, 2).nonzero(as_tuple=True)
    B, Q, N = relative_index_BQN.shape
    return VisiblePairs(
        query=row_M * Q + query_M,
        image=image_BN[row_M, place_M],
        relative=relative_index_BQN[row_M, query_M, place_M],
        are_queries=N == 1 and len(row_M) == B * Q,
    )


def log_normalizers(logit_MHj: Tensor, pairs: VisiblePairs, num_queries: int) -> Tensor:
    """log(1 + sum of exp(logit)) over all samples of all pairs of a query: (q, H).

    The 1 is the logit of zero, "look nowhere", with which maximum and sum start.
    """
    zero_qH = logit_MHj.new_zeros(num_queries, logit_MHj.shape[1])
    highest_MH = logit_MHj.amax(-1)
    if pairs.are_queries:
        greatest_qH = torch.maximum(zero_qH, highest_MH)
    else:
        index_MH = pairs.query[:, None].expand(-1, logit_MHj.shape[1])
        greatest_qH = zero_qH.scatter_reduce(0, index_MH, highest_MH, "amax")
    every = slice(None)
    sum_MH = (logit_MHj - pairs.rows(greatest_qH, every)[..., None]).exp_().sum(-1)
    total_qH = greatest_qH.neg().exp_()
    pairs.add(total_qH, every, sum_MH)
    return total_qH.log_().add_(greatest_qH)
