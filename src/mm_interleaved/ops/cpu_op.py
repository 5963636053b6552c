"""Weighted bilinear sampling as embedding bags: no sample is ever stored, forward or backward.

A cell of a head is a row of a table, a query's samples in an image are an embedding bag of rows, four a
point. The work is cut into portions that fit a processor's cache. Backward computes places and weights again:
what is kept is the arguments, the result and one number a query and head.
Letters: M visible pairs of query and image, n of them in a portion, q queries of all rows, j samples of a
pair and head (L * P), b bags (a pair and head each), r rows a bag (4 j), R rows of a table; the others as in
`attention.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_interleaved.ops.bilinear import (
    BilinearTerms,
    Levels,
    bilinear_gradients,
    bilinear_terms,
    bilinear_weights,
    level_table,
)
from mm_interleaved.ops.embedding_bag import sum_embedding_bags, table_gradient, weight_gradients
from mm_interleaved.ops.visible_pairs import VisiblePairs, log_normalizers, visible_pairs

# Table rows looked up at once: on a CPU a few megabytes of row numbers and weights, elsewhere as many as
# memory bears, since each portion costs dozens of kernels.
PORTION_ON_CPU, PORTION = 2**19, 2**26
# Row numbers and their sums stay below this.
ROWS_IN_32_BITS = 2**31


class Sizes(NamedTuple):
    """The numbers of one call that are no tensors."""

    level_sizes: tuple[int, ...]
    num_points: int
    base_size: float


def attend_gather(
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: tuple[int, ...],
    num_points: int,
    base_size: float,
    ignore_HD: Tensor,
) -> Tensor:
    """`multi_image_deformable_attention`, its optional arguments filled in, over the visible pairs alone."""
    # Half precision cannot count the cells of a large map.
    exact = torch.promote_types(query_term_BQHE.dtype, torch.float32)
    terms = (query_term_BQHE.to(exact), index_term_KHE.to(exact), reference_BQ2.to(exact))
    inputs = (value_JSHD, *terms, ignore_HD)
    sizes = Sizes(level_sizes, num_points, base_size)
    if torch.compiler.is_compiling():
        return attend_visible_pairs(
            *inputs, image_BN, relative_index_BQN, list(level_sizes), num_points, float(base_size)
        )[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Attend.apply(*inputs, image_BN, relative_index_BQN, sizes)
    return _attend(*inputs, image_BN, relative_index_BQN, sizes)[0]


@torch.library.custom_op("mm_interleaved::attend_visible_pairs", mutates_args=())
def attend_visible_pairs(
    value_JSHD: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    reference_BQ2: Tensor,
    ignore_HD: Tensor,
    image_BN: Tensor,
    relative_index_BQN: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
) -> tuple[Tensor, Tensor]:
    """`_attend` as one step of compiled code, which cannot know how many pairs there are; differentiable."""
    sizes = Sizes(tuple(level_sizes), num_points, base_size)
    return _attend(
        value_JSHD, query_term_BQHE, index_term_KHE, reference_BQ2, ignore_HD, image_BN, relative_index_BQN,
        sizes,
    )  # fmt: skip


@attend_visible_pairs.register_fake
def _(value_JSHD: Tensor, query_term_BQHE: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    B, Q, H, _ = query_term_BQHE.shape
    return value_JSHD.new_empty(B, Q, H, value_JSHD.shape[-1]), query_term_BQHE.new_empty(B * Q, H)


@torch.library.custom_op("mm_interleaved::attend_visible_pairs_backward", mutates_args=())
def attend_visible_pairs_backward(
    gradient_BQHD: Tensor,
    value_JSHD: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    reference_BQ2: Tensor,
    ignore_HD: Tensor,
    image_BN: Tensor,
    relative_index_BQN: Tensor,
    out_BQHD: Tensor,
    normalizer_qH: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`_gradients` as one step of compiled code: those that are needed."""
    saved = (value_JSHD, query_term_BQHE, index_term_KHE, reference_BQ2, ignore_HD, image_BN,
             relative_index_BQN, out_BQHD, normalizer_qH)  # fmt: skip
    sizes = Sizes(tuple(level_sizes), num_points, base_size)
    gradients = _gradients(gradient_BQHD, saved, sizes, needs)
    return [gradient for gradient in gradients if gradient is not None]


@attend_visible_pairs_backward.register_fake
def _(gradient_BQHD: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _, _, _, needs = arguments
    return [torch.empty_like(tensor) for tensor, need in zip(tensors[:5], needs, strict=True) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.level_sizes, ctx.num_points, ctx.base_size = inputs
    ctx.save_for_backward(*tensors, *output)


def _compiled_backward(ctx: Any, gradient_BQHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    gradients = iter(
        attend_visible_pairs_backward(
            gradient_BQHD, *ctx.saved_tensors, ctx.level_sizes, ctx.num_points, ctx.base_size, needs
        )
    )
    return *(next(gradients) if need else None for need in needs), None, None, None, None, None


attend_visible_pairs.register_autograd(_compiled_backward, setup_context=_keep_for_backward)


def sample_gather(
    value_BSHD: Tensor, level_sizes: tuple[int, ...], location_BQHLP2: Tensor, weight_BQHLP: Tensor
) -> Tensor:
    """Sum of bilinear samples. Arguments and result as `deformable_sampling`."""
    exact = torch.promote_types(location_BQHLP2.dtype, torch.float32)
    return _Sample.apply(value_BSHD, location_BQHLP2.to(exact), weight_BQHLP.to(exact), level_sizes)


def _attend(
    value_JSHD: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    reference_BQ2: Tensor,
    ignore_HD: Tensor,
    image_BN: Tensor,
    relative_index_BQN: Tensor,
    sizes: Sizes,
) -> tuple[Tensor, Tensor]:
    """Softmax over all pairs of a query and one logit of zero, by embedding bags: the result, and the
    logarithms of what all weights were divided by, (q, H).
    """
    B, Q, H, _ = query_term_BQHE.shape
    pairs = visible_pairs(relative_index_BQN, image_BN)
    term_MHE = _pair_terms(query_term_BQHE, index_term_KHE, pairs, relative_index_BQN)
    logit_MHj = term_MHE[..., 2 * sizes.num_points :]
    normalizer_qH = log_normalizers(logit_MHj, pairs, B * Q)
    reference_q2 = _reference_of_queries(reference_BQ2, B, Q)
    # Sums over images are kept in the precision of the terms, single or better.
    out_qHD = normalizer_qH.neg().exp_()[..., None] * ignore_HD.to(term_MHE.dtype)
    table_RD = value_JSHD.reshape(-1, value_JSHD.shape[-1])
    levels = level_table(sizes.level_sizes, sizes.num_points, term_MHE.dtype, term_MHE.device)
    for portion in _portions(len(pairs.query), logit_MHj.shape[1:].numel(), value_JSHD.device):
        bilinear = _bilinear_terms(
            term_MHE[portion], _references(pairs, portion, reference_q2), levels, sizes
        )
        weight_nHj = _weights(logit_MHj[portion], pairs.rows(normalizer_qH, portion))
        row_br = _rows(bilinear.cell, levels, pairs.image[portion], value_JSHD)
        weight_br = bilinear_weights(bilinear, weight_nHj).view(row_br.shape)
        seen_nHD = sum_embedding_bags(table_RD, row_br, weight_br).view(-1, H, table_RD.shape[1])
        pairs.add(out_qHD, portion, seen_nHD.to(out_qHD.dtype))
    return out_qHD.view(B, Q, H, value_JSHD.shape[-1]).to(value_JSHD.dtype), normalizer_qH


class _Attend(torch.autograd.Function):
    """`_attend` with a backward that keeps no sample."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out_BQHD, normalizer_qH = _attend(*arguments)
        ctx.sizes = arguments[-1]
        ctx.save_for_backward(*arguments[:-1], out_BQHD, normalizer_qH)
        return out_BQHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        return *_gradients(gradient_BQHD, ctx.saved_tensors, ctx.sizes, needs), None, None, None


def _gradients(
    gradient_BQHD: Tensor, saved: Sequence[Tensor], sizes: Sizes, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of the first five arguments of `_attend`, where they are needed, from those of its result.

    Args:
        saved: the tensors among the arguments of `_attend`, then its results.
    """
    (value_JSHD, query_term_BQHE, index_term_KHE, reference_BQ2, ignore_HD, image_BN,
     relative_index_BQN, out_BQHD, normalizer_qH) = saved  # fmt: skip
    B, Q = relative_index_BQN.shape[:2]
    P = sizes.num_points

    # 1. What forward knew.
    pairs = visible_pairs(relative_index_BQN, image_BN)
    term_MHE = _pair_terms(query_term_BQHE, index_term_KHE, pairs, relative_index_BQN)
    dtype = term_MHE.dtype
    reference_q2 = _reference_of_queries(reference_BQ2, B, Q)
    levels = level_table(sizes.level_sizes, P, dtype, term_MHE.device)

    # 2. Pair by pair: values, places, weights.
    gradient_qHD = gradient_BQHD.flatten(0, 1).to(dtype)
    product_qH = (gradient_qHD * out_BQHD.flatten(0, 1)).sum(-1)
    of_value_JSHD = torch.zeros_like(value_JSHD, dtype=dtype) if needs[0] else None
    of_reference_q2 = gradient_qHD.new_zeros(B * Q, 2)
    of_term_MHE = torch.empty_like(term_MHE)
    for portion in _portions(len(pairs.query), term_MHE[..., 2 * P :].shape[1:].numel(), term_MHE.device):
        bilinear = _bilinear_terms(
            term_MHE[portion], _references(pairs, portion, reference_q2), levels, sizes
        )
        weight_nHj = _weights(term_MHE[portion, :, 2 * P :], pairs.rows(normalizer_qH, portion))
        gradient_nHD = pairs.rows(gradient_qHD, portion)
        of_weight_nHj, of_place_2nHj = _sample_gradients(
            gradient_nHD, bilinear, weight_nHj, levels, value_JSHD, pairs.image[portion],
            of_value_JSHD, needs_samples=any(needs[1:4]),
        )  # fmt: skip
        if of_weight_nHj is None:
            continue
        of_weight_nHj.sub_(pairs.rows(product_qH, portion)[..., None])
        torch.mul(of_weight_nHj, weight_nHj, out=of_term_MHE[portion, :, 2 * P :])
        of_location_2nHj = of_place_2nHj.mul_(levels.size)
        of_location_2nHP = of_location_2nHj.unflatten(-1, (-1, P)).sum(-2)
        of_offset_nHP2 = of_term_MHE[portion, :, : 2 * P].unflatten(-1, (P, 2))
        torch.div(of_location_2nHP.movedim(0, -1), sizes.base_size, out=of_offset_nHP2)
        pairs.add(of_reference_q2, portion, of_location_2nHP.sum((2, 3)).t())

    # 3. Summed up over pairs.
    of_query_term = of_index_term = of_reference = of_ignore = None
    if needs[1]:
        of_query_term_qHE = torch.zeros_like(query_term_BQHE).flatten(0, 1)
        pairs.add(of_query_term_qHE, slice(None), of_term_MHE)
        of_query_term = of_query_term_qHE.view_as(query_term_BQHE)
    if needs[2]:
        of_index_term = torch.zeros_like(index_term_KHE).index_add_(0, pairs.relative, of_term_MHE)
    if needs[3]:
        of_reference = of_reference_q2.view(B, Q, 2).sum_to_size(reference_BQ2.shape)
    if needs[4]:
        of_ignore = torch.einsum("qh,qhd->hd", normalizer_qH.neg().exp(), gradient_qHD)
        of_ignore = of_ignore.to(ignore_HD.dtype)
    of_value = None if of_value_JSHD is None else of_value_JSHD.to(value_JSHD.dtype)
    return of_value, of_query_term, of_index_term, of_reference, of_ignore


class _Sample(torch.autograd.Function):
    """Embedding bags whose places and weights are given."""

    @staticmethod
    def forward(
        ctx: Any, value_BSHD: Tensor, location_BQHLP2: Tensor, weight_BQHLP: Tensor, level_sizes: Any
    ) -> Tensor:
        ctx.level_sizes = level_sizes
        ctx.save_for_backward(value_BSHD, location_BQHLP2, weight_BQHLP)
        B, Q, H, L, P = weight_BQHLP.shape
        table_RD = value_BSHD.reshape(-1, value_BSHD.shape[-1])
        levels = level_table(level_sizes, P, location_BQHLP2.dtype, value_BSHD.device)
        out = []
        for portion in _portions(B * Q, H * L * P, value_BSHD.device):
            bilinear, weight_nHj, row_n = _given(portion, location_BQHLP2, weight_BQHLP, levels)
            row_br = _rows(bilinear.cell, levels, row_n, value_BSHD)
            weight_br = bilinear_weights(bilinear, weight_nHj).view(row_br.shape)
            out.append(sum_embedding_bags(table_RD, row_br, weight_br))
        return torch.cat(out).view(B, Q, H, value_BSHD.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        value_BSHD, location_BQHLP2, weight_BQHLP = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, location_BQHLP2.dtype
        B, Q, H, L, P = weight_BQHLP.shape
        levels = level_table(ctx.level_sizes, P, dtype, value_BSHD.device)
        of_value_BSHD = torch.zeros_like(value_BSHD, dtype=dtype) if needs[0] else None
        of_location_nHj2 = location_BQHLP2.new_empty(B * Q, H, L * P, 2)
        of_weight_nHj = weight_BQHLP.new_empty(B * Q, H, L * P)
        gradient_qHD = gradient_BQHD.flatten(0, 1)
        for portion in _portions(B * Q, H * L * P, value_BSHD.device):
            bilinear, weight_nHj, row_n = _given(portion, location_BQHLP2, weight_BQHLP, levels)
            of_weight, of_place_2nHj = _sample_gradients(
                gradient_qHD[portion].to(dtype), bilinear, weight_nHj, levels, value_BSHD, row_n,
                of_value_BSHD, needs_samples=any(needs[1:3]),
            )  # fmt: skip
            if of_weight is not None:
                of_weight_nHj[portion] = of_weight
                of_location_nHj2[portion] = of_place_2nHj.mul_(levels.size).movedim(0, -1)
        return (
            None if of_value_BSHD is None else of_value_BSHD.to(value_BSHD.dtype),
            of_location_nHj2.view_as(location_BQHLP2),
            of_weight_nHj.view_as(weight_BQHLP),
            None,
        )


def _sample_gradients(
    gradient_nHD: Tensor,
    bilinear: BilinearTerms,
    weight_nHj: Tensor,
    levels: Levels,
    value_JSHD: Tensor,
    image_n: Tensor,
    of_value_JSHD: Tensor | None,
    *,
    needs_samples: bool,
) -> Any:
    """Gradients of the weights, (n, H, j), and the places, (2, n, H, j), or None twice if not needed.

    That of the values is added to `of_value_JSHD`, if there is one.
    """
    gradient_bD = gradient_nHD.flatten(0, 1)
    images, place_n = _distinct(image_n)
    value_iSHD = value_JSHD[images].to(gradient_nHD.dtype)
    row_br = _rows(bilinear.cell, levels, place_n, value_iSHD)
    if of_value_JSHD is not None:
        weight_br = bilinear_weights(bilinear, weight_nHj).view(row_br.shape)
        of_table_RD = table_gradient(gradient_bD, value_iSHD.shape[:-1].numel(), row_br, weight_br)
        _add_at(of_value_JSHD, images, of_table_RD.view_as(value_iSHD))
    if not needs_samples:
        return None, None
    of_cell_br = weight_gradients(gradient_bD, value_iSHD.flatten(0, 2), row_br)
    n, H, j = weight_nHj.shape
    return bilinear_gradients(bilinear, of_cell_br.view(n, H, 4, j), weight_nHj, levels)


def _portions(num_pairs: int, samples_per_pair: int, device: torch.device) -> Iterator[slice]:
    rows_at_once = PORTION_ON_CPU if device.type == "cpu" else PORTION
    size = max(1, rows_at_once // max(1, 4 * samples_per_pair))
    return (slice(first, min(first + size, num_pairs)) for first in range(0, num_pairs, size))


def _pair_terms(
    query_term_BQHE: Tensor, index_term_KHE: Tensor, pairs: VisiblePairs, relative_index_BQN: Tensor
) -> Tensor:
    """What each pair adds to places and logits: (M, H, E)."""
    if pairs.are_queries and relative_index_BQN.stride(1) == 0:
        # All pixels of a map look at one image: its term is added to them, not copied for each first.
        return (query_term_BQHE + index_term_KHE[relative_index_BQN[:, :1, 0]]).flatten(0, 1)
    term_MHE = index_term_KHE.index_select(0, pairs.relative)
    return term_MHE.add_(pairs.rows(query_term_BQHE.flatten(0, 1), slice(None)))


def _reference_of_queries(reference_BQ2: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """(q, 2), or (1, 2) where all share one."""
    if reference_BQ2.numel() == 2:
        return reference_BQ2.view(1, 2)
    return reference_BQ2.expand(num_rows, num_queries, 2).reshape(-1, 2)


def _references(pairs: VisiblePairs, portion: slice, reference_q2: Tensor) -> Tensor:
    """(n, 2), or (1, 2) where all share one."""
    return reference_q2 if len(reference_q2) == 1 else pairs.rows(reference_q2, portion)


def _bilinear_terms(term_nHE: Tensor, reference_n2: Tensor, levels: Levels, sizes: Sizes) -> BilinearTerms:
    """Where the pairs of a portion look."""
    P = sizes.num_points
    offset_2nHP = term_nHE[..., : 2 * P].unflatten(-1, (P, 2)).movedim(-1, 0)
    # Written into memory in the order of its axes: a sum keeps that of the offsets, x beside y, which slows
    # down what follows (341 queries, 16 heads, 3 levels of 8 points, one core: 0.74 ms against 1.0, 2026-11).
    location_2nHP = offset_2nHP.new_empty(offset_2nHP.shape)
    torch.add(reference_n2.t()[..., None, None], offset_2nHP, alpha=1 / sizes.base_size, out=location_2nHP)
    place_2nHLP = location_2nHP.new_empty(*location_2nHP.shape[:-1], len(sizes.level_sizes), P)
    half = location_2nHP.new_tensor(-0.5)
    for level, size in enumerate(sizes.level_sizes):
        torch.add(half, location_2nHP, alpha=size, out=place_2nHLP[..., level, :])
    return bilinear_terms(place_2nHLP.flatten(-2), levels)


def _weights(logit_nHj: Tensor, normalizer_nH: Tensor) -> Tensor:
    """What the samples of a portion weigh: one, over all pairs of a query and looking nowhere."""
    return (logit_nHj - normalizer_nH[..., None]).exp_()


def _given(
    portion: slice, location_BQHLP2: Tensor, weight_BQHLP: Tensor, levels: Levels
) -> tuple[BilinearTerms, Tensor, Tensor]:
    """Cells, weights and rows of the embedding bags of a portion."""
    location_nHj2 = location_BQHLP2.flatten(0, 1)[portion].flatten(2, 3)
    # In the order of its axes, as in `_bilinear_terms`.
    place_2nHj = (location_nHj2.movedim(-1, 0).contiguous() * levels.size).sub_(0.5)
    row_n = torch.arange(portion.start, portion.stop, device=place_2nHj.device)
    row_n = row_n.div_(location_BQHLP2.shape[1], rounding_mode="floor")
    weight_nHj = weight_BQHLP.flatten(0, 1)[portion].flatten(2)
    return bilinear_terms(place_2nHj, levels), weight_nHj, row_n


def _rows(cell_nHj: Tensor, levels: Levels, image_n: Tensor, value_JSHD: Tensor) -> Tensor:
    """Rows of the table of (image, cell, head), the memory order of the values, of all four cells: (b, r).

    32-bit numbers where they suffice: half the memory, and half the time to sort.
    """
    J, S, table_heads, _ = value_JSHD.shape
    n, H, j = cell_nHj.shape
    dtype = torch.int32 if J * S * table_heads < ROWS_IN_32_BITS else torch.int64
    first_n1 = (image_n * (S * table_heads)).to(dtype)[:, None]
    if table_heads > 1:
        first_n1 = first_n1 + torch.arange(H, dtype=dtype, device=image_n.device)
    row_nHj = torch.add(first_n1[..., None], cell_nHj, alpha=table_heads)
    return (row_nHj[:, :, None] + levels.steps * table_heads).view(n * H, 4 * j)


def _distinct(image_n: Tensor) -> tuple[slice | Tensor, Tensor]:
    """Which images stand there, as an index, and where among them each one does.

    A slice where they follow one another, as they mostly do: it takes no copy.
    """
    images, place_n = torch.unique_consecutive(image_n, return_inverse=True)
    if bool((images.diff() == 1).all()):
        return slice(int(images[0]), int(images[-1]) + 1), place_n
    return images, place_n


def _add_at(total_JSHD: Tensor, images: slice | Tensor, part_iSHD: Tensor) -> None:
    """An image may stand in several places of an index."""
    if isinstance(images, slice):
        total_JSHD[images] += part_iSHD
    else:
        total_JSHD.index_add_(0, images, part_iSHD)
