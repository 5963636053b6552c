"""The fused synchronizer as an operator of PyTorch: launches `triton_kernel.py`, differentiable, compilable.

Both passes are custom operators with a fake implementation, so `torch.compile` keeps them whole. With
TRITON_INTERPRET=1, set before Triton is imported, the kernels run on a CPU, for tests.
Letters: see `attention.py`.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mm_interleaved.ops.triton_kernel import (
    combine_kernel,
    forward_kernel,
    term_gradients_kernel,
    value_gradients_kernel,
)

IS_INTERPRETED = triton.knobs.runtime.interpret
"""As Triton saw it when it made the kernels, just now."""
# Tiles and warps are not tuned: chosen by reasoning (2026-11), on no GPU yet.
FEW_QUERIES = 4
"""Up to so many queries of a row, each is a tile of its own, its points side by side: decoding."""
IMAGES_PER_SPLIT = 2
"""Images that one program looks into while decoding; more programs hide more latency."""
FORWARD_BLOCK, VALUE_GRADIENT_BLOCK = 2048, 4096
"""Rows times channels of a program, of 64 channels: 32 queries share the cache, 64 are added up before they
meet in memory."""
TERM_GRADIENT_BYTES, TERM_GRADIENT_REGISTERS = 4096, 128
"""The same for the gradients of the terms, in bytes of values: with so many, a thread's registers suffice.
The second, for values in half precision, keeps ptxas from saving registers at the price of spilling some."""
VALUE_GRADIENT_CHANNELS = 128
"""At most so many of a head are added up at a time."""
COMBINED_ROWS = 16
ENOUGH_PROGRAMS = 2048
"""More programs than run at a time, on any GPU."""


class Tile(NamedTuple):
    """Queries of one program, a rectangle of the grid in which they stand, and points side by side."""

    width: int
    height: int
    points: int = 1

    @property
    def rows(self) -> int:
        return self.width * self.height * self.points


def choose_tile(num_queries: int, grid_width: int, block_d: int, block_size: int) -> Tile:
    """A tile of about `block_size` rows times channels: a rectangle of a grid, or neighbours in a line."""
    rows = min(64, max(1, block_size // block_d))
    if grid_width == num_queries:
        return Tile(rows, 1)
    height = 2 ** ((rows.bit_length() - 1) // 2)
    return Tile(rows // height, height)


def choose_forward_tile(num_queries: int, grid_width: int, block_d: int, num_points: int) -> Tile:
    """As `choose_tile`, but for few queries: they need more programs than there are tiles."""
    if num_queries > FEW_QUERIES:
        return choose_tile(num_queries, grid_width, block_d, FORWARD_BLOCK)
    return Tile(1, 1, min(8, _power_of_two(num_points)))


def attend_triton(
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
    ignore_HD: Tensor,
) -> Tensor:
    """`multi_image_deformable_attention`, its optional arguments filled in, in one kernel.

    Any visibility is right; where the images that a query sees follow one another, none is looked at in vain.

    Raises:
        ValueError: the tensors are on a CPU, and Triton does not interpret.
    """
    if value_JSHD.device.type == "cpu" and not IS_INTERPRETED:
        raise ValueError("implementation 'triton' needs a GPU, but the values are on the CPU: use 'auto'")
    if query_term_BQHE.dtype in (torch.float16, torch.bfloat16):
        query_term_BQHE = query_term_BQHE.float()
    out, _ = attend_images(
        value_JSHD,
        image_BN,
        query_term_BQHE,
        index_term_KHE.to(query_term_BQHE.dtype),
        relative_index_BQN,
        reference_BQ2.to(query_term_BQHE.dtype),
        ignore_HD,
        list(level_sizes),
        num_points,
        float(base_size),
    )
    return out


@torch.library.custom_op("mm_interleaved::attend_images", mutates_args=())
def attend_images(
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    ignore_HD: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
) -> tuple[Tensor, Tensor]:
    """What the queries see (B, Q, H, D), and the logarithm of each one's sum of exponentials (B, Q, H).

    Arguments as those of `attend_triton`; terms and reference in one dtype, the reference for each row and
    query, or for all.
    """
    out_BQHD, lse_BQH = _empty_results(value_JSHD, query_term_BQHE)
    if not out_BQHD.numel():
        return out_BQHD, lse_BQH
    (B, Q, H, D), N = out_BQHD.shape, image_BN.shape[1]
    query_term_BQHE, value_JSHD = query_term_BQHE.contiguous(), _with_adjacent_channels(value_JSHD)
    grid_width = _grid_width(reference_BQ2, Q)
    reference_BQ2 = _with_adjacent_channels(reference_BQ2).expand(B, Q, 2)
    sizes = kernel_sizes(H, D, level_sizes, num_points, base_size)
    tile = choose_forward_tile(Q, grid_width, sizes["BLOCK_D"], num_points)
    splits = _ceil_div(N, IMAGES_PER_SPLIT) if Q <= FEW_QUERIES else 1
    if splits > 1:
        part = query_term_BQHE.new_empty(splits, B, Q, H, D)
        part_max, part_sum = part.new_empty(splits, B, Q, H), part.new_empty(splits, B, Q, H)
    else:
        part, part_max, part_sum = out_BQHD, lse_BQH, lse_BQH
    with torch.cuda.device_of(value_JSHD):
        forward_kernel[(_num_tiles(Q, grid_width, tile), B * H, splits)](
            value_JSHD,
            image_BN.contiguous(),
            query_term_BQHE,
            index_term_KHE.contiguous(),
            relative_index_BQN,
            reference_BQ2,
            ignore_HD.contiguous(),
            part,
            part_max,
            part_sum,
            Q,
            grid_width,
            N,
            IMAGES_PER_SPLIT,
            *_value_strides(value_JSHD),
            *relative_index_BQN.stride(),
            *reference_BQ2.stride()[:2],
            **sizes,
            IS_SPLIT=splits > 1,
            TILE_WIDTH=tile.width,
            TILE_HEIGHT=tile.height,
            BLOCK_P=tile.points,
            num_warps=choose_warps(tile, sizes["BLOCK_D"]),
        )
        if splits > 1:
            tile = Tile(COMBINED_ROWS, 1)
            combine_kernel[(_ceil_div(B * Q * H, tile.rows),)](
                part,
                part_max,
                part_sum,
                out_BQHD,
                lse_BQH,
                B * Q * H,
                splits,
                D=D,
                BLOCK_D=sizes["BLOCK_D"],
                BLOCK_M=tile.rows,
                num_warps=choose_warps(tile, sizes["BLOCK_D"]),
            )
    return out_BQHD, lse_BQH


@attend_images.register_fake
def _(value: Tensor, image: Tensor, query_term: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(value, query_term)


@torch.library.custom_op("mm_interleaved::attend_images_backward", mutates_args=())
def attend_images_backward(
    grad_out_BQHD: Tensor,
    value_JSHD: Tensor,
    image_BN: Tensor,
    query_term_BQHE: Tensor,
    index_term_KHE: Tensor,
    relative_index_BQN: Tensor,
    reference_BQ2: Tensor,
    out_BQHD: Tensor,
    lse_BQH: Tensor,
    level_sizes: Sequence[int],
    num_points: int,
    base_size: float,
    needs_value: bool,
    needs_query_term: bool,
    needs_index_term: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values, the query terms and the index terms; empty where they are not needed.

    Sums of many queries are added up in the terms' dtype (float32), in no fixed order, and rounded once.
    """
    real = query_term_BQHE.dtype
    grad_value = value_JSHD.new_zeros(value_JSHD.shape if needs_value else 0, dtype=real)
    grad_query_term = query_term_BQHE.new_empty(query_term_BQHE.shape if needs_query_term else 0)
    grad_index_term = index_term_KHE.new_zeros(index_term_KHE.shape if needs_index_term else 0)
    grad_out_BQHD = grad_out_BQHD.contiguous()
    query_term_BQHE, index_term_KHE = query_term_BQHE.contiguous(), index_term_KHE.contiguous()
    image_BN, value_JSHD = image_BN.contiguous(), _with_adjacent_channels(value_JSHD)
    (B, Q, H, D), N = out_BQHD.shape, image_BN.shape[1]
    grid_width = _grid_width(reference_BQ2, Q)
    reference_BQ2 = _with_adjacent_channels(reference_BQ2).expand(B, Q, 2)
    sizes = kernel_sizes(H, D, level_sizes, num_points, base_size)
    block_d = sizes["BLOCK_D"]
    queries = (Q, grid_width, N)
    strides = (*relative_index_BQN.stride(), *reference_BQ2.stride()[:2])
    if not out_BQHD.numel():
        return grad_value, grad_query_term, grad_index_term
    with torch.cuda.device_of(value_JSHD):
        if needs_query_term or needs_index_term:
            tile = choose_tile(Q, grid_width, block_d, TERM_GRADIENT_BYTES // value_JSHD.element_size())
            term_gradients_kernel[_backward_grid(out_BQHD, grid_width, tile, num_points)](
                value_JSHD,
                image_BN,
                query_term_BQHE,
                index_term_KHE,
                relative_index_BQN,
                reference_BQ2,
                out_BQHD,
                lse_BQH,
                grad_out_BQHD,
                grad_query_term,
                grad_index_term,
                *queries,
                *_value_strides(value_JSHD),
                *strides,
                **sizes,
                NEEDS_QUERY_TERM=needs_query_term,
                NEEDS_INDEX_TERM=needs_index_term,
                TILE_WIDTH=tile.width,
                TILE_HEIGHT=tile.height,
                num_warps=choose_warps(tile, block_d),
                maxnreg=TERM_GRADIENT_REGISTERS if value_JSHD.element_size() == 2 else None,
            )
        if needs_value:
            # A matrix product wants 16 rows, and its operands lie in shared memory.
            sizes["BLOCK_D"] = block_d = min(block_d, VALUE_GRADIENT_CHANNELS)
            tile = choose_tile(Q, grid_width, block_d, VALUE_GRADIENT_BLOCK)
            tiles, heads, programs = _backward_grid(out_BQHD, grid_width, tile, num_points)
            value_gradients_kernel[tiles, heads * _ceil_div(D, block_d), programs](
                image_BN,
                query_term_BQHE,
                index_term_KHE,
                relative_index_BQN,
                reference_BQ2,
                lse_BQH,
                grad_out_BQHD,
                grad_value,
                *queries,
                *_value_strides(grad_value),
                *strides,
                **sizes,
                PRECISION=dot_precision(value_JSHD.dtype),
                TILE_WIDTH=tile.width,
                TILE_HEIGHT=tile.height,
                num_warps=choose_warps(tile, block_d),
            )
    return grad_value.to(value_JSHD.dtype), grad_query_term, grad_index_term


@attend_images_backward.register_fake
def _(
    grad_out: Tensor, value: Tensor, image: Tensor, query_term: Tensor, index_term: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_value, needs_query_term, needs_index_term = rest[-3:]
    return (
        value.new_empty(value.shape if needs_value else 0),
        query_term.new_empty(query_term.shape if needs_query_term else 0),
        index_term.new_empty(index_term.shape if needs_index_term else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    value, image, query_term, index_term, relative_index, reference, ignore, *sizes = inputs
    ctx.save_for_backward(value, image, query_term, index_term, relative_index, reference, *output)
    ctx.sizes, ctx.ignore_dtype = sizes, ignore.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Nothing differentiates `lse`: it is there for this function alone."""
    nothing = (None,) * 10
    if grad_out is None:
        return nothing
    needs_value, _, needs_query_term, needs_index_term, _, needs_reference, needs_ignore, *_ = (
        ctx.needs_input_grad
    )
    *arguments, reference, out, lse = ctx.saved_tensors
    grad_value, grad_query_term, grad_index_term = attend_images_backward(
        grad_out,
        *arguments,
        reference,
        out,
        lse,
        *ctx.sizes,
        needs_value,
        needs_query_term or needs_reference,
        needs_index_term,
    )
    grad_reference = grad_ignore = None
    if needs_reference:
        _, num_points, base_size = ctx.sizes
        # A location is the reference plus an offset / base_size.
        offsets_BQHP2 = grad_query_term[..., : 2 * num_points].unflatten(-1, (num_points, 2))
        grad_reference = (offsets_BQHP2.sum((2, 3)) * base_size).sum_to_size(reference.shape)
    if needs_ignore:
        # exp(-lse) is the weight of looking nowhere.
        grad_ignore = torch.einsum("bqhd,bqh->hd", grad_out.to(lse.dtype), (-lse).exp()).to(ctx.ignore_dtype)
    return (
        grad_value if needs_value else None,
        None,
        grad_query_term if needs_query_term else None,
        grad_index_term if needs_index_term else None,
        None,
        grad_reference,
        grad_ignore,
        *nothing[7:],
    )


attend_images.register_autograd(_backward, setup_context=_save_for_backward)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


def _empty_results(value_JSHD: Tensor, query_term_BQHE: Tensor) -> tuple[Tensor, Tensor]:
    B, Q, H, _ = query_term_BQHE.shape
    return value_JSHD.new_empty(B, Q, H, value_JSHD.shape[-1]), query_term_BQHE.new_empty(B, Q, H)


def _with_adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _value_strides(value_JSHD: Tensor) -> tuple[int, int, int]:
    """Of images, cells and heads; one map may be shared by all heads."""
    j, s, h, _ = value_JSHD.stride()
    return j, s, h if value_JSHD.shape[2] > 1 else 0


def _grid_width(reference_BQ2: Tensor, num_queries: int) -> int:
    """Queries in a line of the grid in which they stand: of a square one if they are as many and each has a
    place of its own, else of one line.

    A guess that decides about speed alone: which queries share a program.
    """
    side = isqrt(num_queries)
    return side if reference_BQ2.shape[1] > 1 and side * side == num_queries else num_queries


def _num_tiles(num_queries: int, grid_width: int, tile: Tile) -> int:
    height = _ceil_div(num_queries, grid_width)
    return _ceil_div(grid_width, tile.width) * _ceil_div(height, tile.height)


def _backward_grid(out_BQHD: Tensor, grid_width: int, tile: Tile, num_points: int) -> tuple[int, int, int]:
    """Tiles, rows times heads, and programs that share the points: more where tiles alone fill no GPU."""
    B, Q, H, _ = out_BQHD.shape
    tiles = _num_tiles(Q, grid_width, tile)
    return tiles, B * H, min(num_points, _ceil_div(ENOUGH_PROGRAMS, tiles * B * H))


def choose_warps(tile: Tile, block_d: int) -> int:
    """Eight channels a lane up to four warps; then more channels a lane, then more warps."""
    return min(8, max(1, tile.rows * block_d // (8 * 32)))


def dot_precision(value_dtype: torch.dtype) -> str:
    """How tensor cores multiply weights in float32 by gradients that have the values' dtype.

    Half precision fits TF32 as it is, and a weight loses less than the gradient has lost already.
    """
    return "tf32" if value_dtype.itemsize == 2 else "tf32x3"


def kernel_sizes(
    H: int, D: int, level_sizes: Sequence[int], num_points: int, base_size: float
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    ends = list(accumulate(size * size for size in level_sizes))
    return {
        "H": H,
        "L": len(level_sizes),
        "P": num_points,
        "D": D,
        "BLOCK_D": max(16, _power_of_two(D)),
        "LEVEL_SIZES": tuple(level_sizes),
        "LEVEL_STARTS": (0, *ends[:-1]),
        "BASE_SIZE": base_size,
    }
