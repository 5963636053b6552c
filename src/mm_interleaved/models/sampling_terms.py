"""What `ops.multi_image_deformable_attention` takes of the queries, made fit for it.

Letters: B rows, Q queries, N images, H heads, E terms a head (see `ops.attention`), K rows of the
relative-index table.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm_interleaved.tokens.visibility import relative_image_index

CENTRE = 0.5
"""Of an image, in x and in y: where queries without a place of their own look from."""


class Terms(NamedTuple):
    """Four arguments of the op, in its order.

    Offsets and logits of the queries alone (B, Q, H, E) and of each relative index alone (K, H, E); the
    relative indices (B, Q, N); the reference points (B or 1, Q or 1, 2).
    """

    query_BQHE: Tensor  # noqa: N815
    index_KHE: Tensor  # noqa: N815
    relative_index_BQN: Tensor  # noqa: N815
    reference_BQ2: Tensor  # noqa: N815


def sampling_terms(
    query_BQHE: Tensor, index_KHE: Tensor, relative_index_BQN: Tensor, reference_BQ2: Tensor | None = None
) -> Terms:
    """In single precision or better: in half, coordinates on a map of 64 are off by an eighth of a cell.

    Args:
        reference_BQ2: default the centre.
    """
    exact = torch.promote_types(query_BQHE.dtype, torch.float32)
    query_BQHE, index_KHE = query_BQHE.to(exact), index_KHE.to(exact)
    if reference_BQ2 is None:
        reference_BQ2 = query_BQHE.new_full((1, 1, 2), CENTRE)
    return Terms(query_BQHE, index_KHE, relative_index_BQN, reference_BQ2.to(exact))


def checked_relative_index(visible_BQN: Tensor, max_images: int) -> Tensor:
    """Relative indices (1 = newest visible image, 0 = hidden) of what is visible, if not given already.

    Raises:
        ValueError: one exceeds the table, whose `max_images` rows begin with the hidden one.
    """
    index = relative_image_index(visible_BQN) if visible_BQN.dtype == torch.bool else visible_BQN
    # The maximum is only read (a device sync) where so many images are there at all. Compiled code sees as
    # many as the pass before it, which read the prompt.
    is_many = index.shape[-1] >= max_images and not torch.compiler.is_compiling()
    if is_many and int(index.max()) >= max_images:
        raise ValueError(f"a query sees {int(index.max())} images, at most {max_images - 1} are possible")
    return index
