"""What the arithmetic costs, counted from shapes: the model that stands beside each measured ratio.

A lower bound, counted by hand on purpose: the operations that the formulas need and the bytes that memory
must deliver, whatever an implementation does beside them. `mm_interleaved.models.operations` counts what
the code executes instead, which includes what an implementation wastes and knows no bytes. A multiplication
and its addition are two operations. Bytes are those that memory must deliver at least once. Letters as in
`textbook.py`; M visible pairs of a query and an image, E terms of a query.
"""

from dataclasses import dataclass

from benchmarks.sizes import SynchronizerSize

CORNERS = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """The least time that a machine of these rates needs."""
        return max(self.flops / flops_a_second, self.bytes / bytes_a_second)


def textbook_cost(size: SynchronizerSize, queries: int, images: int, rows: int, width: int) -> Cost:
    """Every value projected, every query repeated for each image.

    Args:
        rows: documents of the batch.
        width: bytes a number.
    """
    D, C, V, S = size.query_dim, size.feature_dim, size.value_dim, size.cells
    slots = size.num_heads * len(size.level_sizes) * (size.num_points + 1)
    outputs = size.num_heads * size.num_points * 2 + slots
    expanded = queries * images
    flops = 2.0 * rows * (images * S * C * V + expanded * D * D + expanded * D * outputs + queries * V * D)
    flops += sampling_flops(size, rows * expanded)
    weights = D * D + D * outputs + C * V + V * D
    # Features are read and written by the norm, read by the projection, which writes values.
    moved = rows * (images * S * (3 * C + 2 * V) + expanded * (2 * D + outputs))
    return Cost(flops, width * (weights + moved))


def cached_cost(
    size: SynchronizerSize, queries: int, pairs: float, rows: int, width: int, images: int | None = None
) -> Cost:
    """Values kept, projections folded into one, only visible pairs: what a call costs at least.

    Args:
        pairs: visible pairs of a query and an image in one row.
        images: see `touched_numbers`.
    """
    D, V, E = size.query_dim, size.value_dim, size.terms
    flops = 2.0 * rows * queries * (D * E + V * D) + sampling_flops(size, rows * pairs)
    touched = touched_numbers(size, pairs, images)
    weights = D * E + V * D + size.max_images * E
    return Cost(flops, width * (weights + rows * (touched + queries * (2 * D + E))))


def projected_cost(size: SynchronizerSize, queries: int, pairs: float, images: int, width: int) -> Cost:
    """`cached_cost` of one row whose images are new: their values are projected within the call."""
    cached = cached_cost(size, queries, pairs, 1, width, images)
    moved = size.feature_dim * (size.value_dim + images * size.cells)
    return Cost(cached.flops + projection_flops(size, images), cached.bytes + width * moved)


def sample_first_cost(size: SynchronizerSize, pairs: float, rows: int, width: int) -> Cost:
    """One query a row; features are sampled, each head takes its own share, and only that is projected.

    Args:
        pairs: images that the query sees.
    """
    D, C, V, E = size.query_dim, size.feature_dim, size.value_dim, size.terms
    # The samples of a head are as wide as the features.
    sampled = 2.0 * CORNERS * size.samples * C * pairs
    flops = rows * (2.0 * (D * E + C * V + V * D) + sampled)
    touched = min(size.samples * CORNERS, size.cells) * C * pairs
    weights = D * E + C * V + V * D + size.max_images * E
    return Cost(flops, width * (weights + rows * (touched + 2 * D + E)))


def dense_cost(size: SynchronizerSize, images: int, rows: int, rows_of_images: int, width: int) -> Cost:
    """One query a row; every cell is weighed, and all features are read."""
    D, C, V, E = size.query_dim, size.feature_dim, size.value_dim, size.terms
    cells = images * size.cells
    # The hats of all points are multiplied into a map each before that.
    hats = 2.0 * cells * size.num_heads * size.num_points
    flops = rows * (2.0 * (D * E + C * V + V * D) + hats + 2.0 * size.num_heads * cells * C)
    weights = D * E + C * V + V * D + size.max_images * E
    moved = rows_of_images * cells * C + rows * (2 * size.num_heads * cells + 2 * D + E)
    return Cost(flops, width * (weights + moved))


def projection_flops(size: SynchronizerSize, images: int) -> float:
    """Of the values of images, once."""
    return 2.0 * images * size.cells * size.feature_dim * size.value_dim


def sampling_bytes(
    size: SynchronizerSize, queries: int, pairs: float, images: int, value_width: int, term_width: int
) -> float:
    """Of one row: cells that are touched, terms of queries and of relative indices, the result."""
    terms = (queries + size.max_images) * size.terms
    touched = touched_numbers(size, pairs, images)
    return value_width * (touched + queries * size.value_dim) + term_width * terms


def given_places_cost(size: SynchronizerSize, queries: int, images: int, width: int) -> Cost:
    """Of one row, by a kernel that is given a place and a weight for each sample, of hidden images too."""
    pairs = queries * images
    # Two coordinates and a weight.
    moved = touched_numbers(size, pairs, images) + 3 * size.samples * pairs + queries * size.value_dim
    return Cost(sampling_flops(size, pairs), width * moved)


def touched_numbers(size: SynchronizerSize, pairs: float, images: int | None = None) -> float:
    """Numbers of values that pairs of a query and an image must have from memory: of an image
    no more than all, once for the pairs that share it.

    Args:
        images: that the pairs share; an image each where not given.
    """
    sampled = size.samples * CORNERS * size.head_dim * pairs
    return min(sampled, size.cells * size.value_dim * (pairs if images is None else images))


def sampling_flops(size: SynchronizerSize, pairs: float) -> float:
    """Of the weighted bilinear samples of pairs of a query and an image."""
    return 2.0 * CORNERS * size.samples * size.head_dim * pairs
