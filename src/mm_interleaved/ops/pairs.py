"""Who looks at what: the visible pairs of query and image, and the softmax over the pairs of a query.

Letters: M visible pairs, q queries of all rows; the others as in `attention.py`.
"""

from typing import NamedTuple

from torch import Tensor


class VisiblePairs(NamedTuple):
    """All pairs, image after image, and of an image query after query, each (M,) int64.

    `query`: which of the B * Q queries. `image`: which of the J images. `relative`: row of the relative-index
    table.
    """

    query: Tensor
    image: Tensor
    relative: Tensor


def visible_pairs(relative_index_BQN: Tensor, image_BN: Tensor) -> VisiblePairs:
    """Packed documents pay for their own images alone. Costs one synchronisation with the device."""
    row_M, place_M, query_M = relative_index_BQN.transpose(1, 2).nonzero(as_tuple=True)
    return VisiblePairs(
        query=row_M * relative_index_BQN.shape[1] + query_M,
        image=image_BN[row_M, place_M],
        relative=relative_index_BQN[row_M, query_M, place_M],
    )


def log_normalizers(logit_MHj: Tensor, query_M: Tensor, num_queries: int) -> Tensor:
    """log(1 + sum of exp(logit)) over all samples of all pairs of a query: (q, H).

    The 1 is the logit of zero, "look nowhere", with which maximum and sum start.
    """
    zero_qH = logit_MHj.new_zeros(num_queries, logit_MHj.shape[1])
    index_MH = query_M[:, None].expand(-1, logit_MHj.shape[1])
    greatest_qH = zero_qH.scatter_reduce(0, index_MH, logit_MHj.amax(-1), "amax")
    sum_MH = (logit_MHj - greatest_qH.index_select(0, query_M)[..., None]).exp_().sum(-1)
    return greatest_qH.neg().exp_().index_add_(0, query_M, sum_MH).log_().add_(greatest_qH)
