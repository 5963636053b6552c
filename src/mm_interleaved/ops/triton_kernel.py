"""The fused synchronizer on the device: `sampling_plan` and the weighted samples of all images in one pass.

A program takes one head and a tile of queries (a rectangle of a grid, or neighbours in a line: what is close
samples close, and shares cells in the cache). It walks over the images that any of its queries sees; offsets,
logits, locations and weights live in registers and nowhere else. A row of a block is one point slot of one
query (forward), or one query (backward).
The softmax is online: a row starts at the logit of zero, "look nowhere" (maximum 0, sum 1, accumulator =
ignore value), and is rescaled when a greater logit comes. Coordinates, weights and sums have the dtype of
the query terms (float32), whatever the dtype of the values. The backward pass computes it all again from the
terms and `lse`, the logarithm of each query's sum.
`triton_op.py` launches these kernels. Formulas: `sampling_plan`; the four cells of a point: `bilinear.py`.
Letters: as `attention.py`, and R rows of a block, Q queries of a tile, C images of a chunk.
"""

# What is decorated is another language, of which pyright understands the grammar only.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportMissingParameterType=false

import triton
import triton.language as tl

IMAGE_CHUNK = tl.constexpr(32)


@triton.jit
def _tile_rows(
    num_queries,
    grid_width,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Query and point slot of each row of this program's tile, and whether there is such a query."""
    tile = tl.program_id(0)
    tiles_across = (grid_width + TILE_WIDTH - 1) // TILE_WIDTH
    row_R = tl.arange(0, TILE_WIDTH * TILE_HEIGHT * BLOCK_P)
    in_tile_R = row_R // BLOCK_P
    column_R = (tile % tiles_across) * TILE_WIDTH + in_tile_R % TILE_WIDTH
    line_R = (tile // tiles_across) * TILE_HEIGHT + in_tile_R // TILE_WIDTH
    query_R = line_R * grid_width + column_R
    return query_R, row_R % BLOCK_P, (column_R < grid_width) & (query_R < num_queries)


@triton.jit
def _visible_range(rank_pointer_R, is_query_R, num_images, rank_stride_n):
    """First image that any row sees, and one behind the last."""
    first, end = num_images, 0
    for start in range(0, num_images, IMAGE_CHUNK):
        image_1C = start + tl.arange(0, IMAGE_CHUNK)[None, :]
        is_there_RC = is_query_R[:, None] & (image_1C < num_images)
        rank_RC = tl.load(rank_pointer_R[:, None] + image_1C * rank_stride_n, mask=is_there_RC, other=0)
        first = tl.minimum(first, tl.min(tl.where(rank_RC > 0, image_1C, num_images)))
        end = tl.maximum(end, tl.max(tl.where(rank_RC > 0, image_1C + 1, 0)))
    return first, end


@triton.jit
def _map(value_ptr, image_pointer, head, value_stride_j, value_stride_h):
    """Where a head's map of an image begins."""
    return value_ptr + tl.load(image_pointer).to(tl.int64) * value_stride_j + head * value_stride_h


@triton.jit
def _load_sum(left_pointer_R, right_pointer_R, mask_R):
    return tl.load(left_pointer_R, mask=mask_R, other=0.0) + tl.load(right_pointer_R, mask=mask_R, other=0.0)


@triton.jit
def _first_cell(position_R, SIZE: tl.constexpr):
    """The column (or row) left of (above) a position in [0, 1], and how far the position is on to the next.

    Clamped before the cast, to where no neighbour is on the map: a far-off offset must not overflow.
    """
    in_cells_R = position_R * SIZE - 0.5
    floor_R = tl.floor(in_cells_R)
    return tl.minimum(tl.maximum(floor_R, -2.0), SIZE).to(tl.int32), in_cells_R - floor_R


@triton.jit
def _cell(
    column_R,
    right_R,
    line_R,
    below_R,
    RIGHT: tl.constexpr,
    BELOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One of the four cells around a point: its index, whether it is on the map, its shares in x and in y."""
    column_R = column_R + RIGHT
    line_R = line_R + BELOW
    is_on_map_R = (column_R >= 0) & (column_R < SIZE) & (line_R >= 0) & (line_R < SIZE)
    share_x_R = right_R if RIGHT else 1 - right_R
    share_y_R = below_R if BELOW else 1 - below_R
    return line_R * SIZE + column_R, is_on_map_R, share_x_R, share_y_R


@triton.jit
def _with_channels(mask_R, d_D, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """A mask of rows for a block of rows and channels; without the channels' own mask where none is cut."""
    if D % BLOCK_D == 0:
        return mask_R[:, None]
    else:
        return mask_R[:, None] & (d_D < D)[None, :]


@triton.jit(do_not_specialize=["num_queries", "grid_width", "num_images", "images_per_split"])
def forward_kernel(
    value_ptr,
    image_ptr,
    query_term_ptr,
    index_term_ptr,
    rank_ptr,
    reference_ptr,
    ignore_ptr,
    out_ptr,
    max_ptr,
    sum_ptr,
    num_queries,
    grid_width,
    num_images,
    images_per_split,
    value_stride_j,
    value_stride_s,
    value_stride_h,
    rank_stride_b,
    rank_stride_q,
    rank_stride_n,
    reference_stride_b,
    reference_stride_q,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVEL_SIZES: tl.constexpr,
    LEVEL_STARTS: tl.constexpr,
    BASE_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What a tile of queries sees through one head. Grid: (tiles, B * H, splits of the images).

    `image` (B, N) says which image of `value` (J, S, H or 1, D) stands where. It, `query_term` (B, Q, H, E),
    `index_term` (K, H, E), `ignore` (H, D) and what is written are contiguous. `max_ptr` gets the logarithm
    of the sum. If the images are split, each program writes the state of its own ones instead, for
    `combine_kernel`: `out` (splits, B, Q, H, D), not divided, `max` and `sum` (splits, B, Q, H).
    """
    E: tl.constexpr = 2 * P + L * P
    BLOCK_Q: tl.constexpr = TILE_WIDTH * TILE_HEIGHT
    real = query_term_ptr.dtype.element_ty
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    split = tl.program_id(2)

    # 1. Rows, and the images they see.
    query_R, slot_R, is_query_R = _tile_rows(num_queries, grid_width, TILE_WIDTH, TILE_HEIGHT, BLOCK_P)
    rank_pointer_R = rank_ptr + b * rank_stride_b + query_R * rank_stride_q
    first, end = _visible_range(rank_pointer_R, is_query_R, num_images, rank_stride_n)
    if IS_SPLIT:
        first = tl.maximum(first, split * images_per_split)
        end = tl.minimum(end, (split + 1) * images_per_split)
    reference_pointer_R = reference_ptr + b * reference_stride_b + query_R * reference_stride_q
    reference_x_R = tl.load(reference_pointer_R, mask=is_query_R, other=0.0)
    reference_y_R = tl.load(reference_pointer_R + 1, mask=is_query_R, other=0.0)

    # 2. One row of each query, in one split, starts with looking nowhere.
    d_D = tl.arange(0, BLOCK_D)
    starts_R = (slot_R == 0) & (split == 0)
    max_R = tl.zeros_like(slot_R).to(real)
    sum_R = starts_R.to(real)
    ignore_D = tl.load(ignore_ptr + h * D + d_D, mask=d_D < D, other=0.0).to(real)
    acc_RD = tl.where(starts_R[:, None], ignore_D[None, :], 0.0)

    query_pointer_R = query_term_ptr + (b * num_queries * H + h) * E + query_R * (H * E)
    for n in range(first, end):
        rank_R = tl.load(rank_pointer_R + n * rank_stride_n, mask=is_query_R, other=0).to(tl.int32)
        index_pointer_R = index_term_ptr + rank_R * (H * E) + h * E
        map_ptr = _map(value_ptr, image_ptr + b * num_images + n, h, value_stride_j, value_stride_h)
        for first_point in range(0, P, BLOCK_P):
            # 3. Where the points lie.
            point_R = first_point + slot_R
            looks_R = (rank_R > 0) & (point_R < P)
            query_point_R, index_point_R = query_pointer_R + 2 * point_R, index_pointer_R + 2 * point_R
            x_R = reference_x_R + _load_sum(query_point_R, index_point_R, looks_R) / BASE_SIZE
            y_R = reference_y_R + _load_sum(query_point_R + 1, index_point_R + 1, looks_R) / BASE_SIZE

            # 4. Logits of all levels; the state so far in terms of their maximum.
            query_logit_R = query_pointer_R + 2 * P + point_R
            index_logit_R = index_pointer_R + 2 * P + point_R
            logits = ()
            new_max_R = max_R
            for level in tl.static_range(L):
                logit_R = _load_sum(query_logit_R + level * P, index_logit_R + level * P, looks_R)
                logit_R = tl.where(looks_R, logit_R, float("-inf"))
                logits = logits + (logit_R,)  # noqa: RUF005 - Triton adds tuples, it does not unpack them
                new_max_R = tl.maximum(new_max_R, logit_R)
            rescale_R = tl.exp(max_R - new_max_R)
            sum_R = sum_R * rescale_R
            acc_RD = acc_RD * rescale_R[:, None]
            max_R = new_max_R

            # 5. Samples: four cells a level.
            for level in tl.static_range(L):
                weight_R = tl.exp(logits[level] - max_R)
                sum_R += weight_R
                column_R, right_R = _first_cell(x_R, LEVEL_SIZES[level])
                line_R, below_R = _first_cell(y_R, LEVEL_SIZES[level])
                for cell in tl.static_range(4):
                    cell_R, is_on_map_R, share_x_R, share_y_R = _cell(
                        column_R, right_R, line_R, below_R, cell % 2, cell // 2, LEVEL_SIZES[level]
                    )
                    offset_R = (LEVEL_STARTS[level] + cell_R) * value_stride_s
                    cell_RD = tl.load(
                        map_ptr + offset_R[:, None] + d_D[None, :],
                        mask=_with_channels(looks_R & is_on_map_R, d_D, BLOCK_D, D),
                        other=0.0,
                    )
                    acc_RD += (weight_R * share_x_R * share_y_R)[:, None] * cell_RD.to(real)

    # 6. The point slots of a query together.
    query_Q, _slot_Q, is_query_Q = _tile_rows(num_queries, grid_width, TILE_WIDTH, TILE_HEIGHT, 1)
    if BLOCK_P > 1:
        max_QP = tl.reshape(max_R, (BLOCK_Q, BLOCK_P))
        max_Q = tl.max(max_QP, axis=1)
        rescale_QP = tl.exp(max_QP - max_Q[:, None])
        sum_Q = tl.sum(tl.reshape(sum_R, (BLOCK_Q, BLOCK_P)) * rescale_QP, axis=1)
        acc_QPD = tl.reshape(acc_RD, (BLOCK_Q, BLOCK_P, BLOCK_D))
        acc_QD = tl.sum(acc_QPD * rescale_QP[:, :, None], axis=1)
    else:
        max_Q, sum_Q, acc_QD = max_R, sum_R, acc_RD
    state = b * num_queries * H + h
    if IS_SPLIT:
        state += split.to(tl.int64) * tl.num_programs(1) * num_queries
        tl.store(max_ptr + state + query_Q * H, max_Q, mask=is_query_Q)
        tl.store(sum_ptr + state + query_Q * H, sum_Q, mask=is_query_Q)
    else:
        tl.store(max_ptr + state + query_Q * H, max_Q + tl.log(sum_Q), mask=is_query_Q)
        acc_QD = acc_QD / sum_Q[:, None]
    out_pointer_QD = out_ptr + state * D + query_Q[:, None] * (H * D) + d_D[None, :]
    mask_QD = _with_channels(is_query_Q, d_D, BLOCK_D, D)
    tl.store(out_pointer_QD, acc_QD.to(out_ptr.dtype.element_ty), mask=mask_QD)


@triton.jit(do_not_specialize=["num_states", "num_splits"])
def combine_kernel(
    part_ptr,
    part_max_ptr,
    part_sum_ptr,
    out_ptr,
    lse_ptr,
    num_states,
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The states of all splits as one: (splits, M, D) and (splits, M) become (M, D) and (M), M = B * Q * H.

    Grid: (blocks of M,).
    """
    real = part_ptr.dtype.element_ty
    d_D = tl.arange(0, BLOCK_D)
    state_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_state_M = state_M < num_states
    mask_MD = _with_channels(is_state_M, d_D, BLOCK_D, D)
    max_M = tl.zeros([BLOCK_M], dtype=real)
    sum_M = tl.zeros([BLOCK_M], dtype=real)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=real)
    for _split in range(num_splits):
        part_max_M = tl.load(part_max_ptr + state_M, mask=is_state_M, other=0.0)
        part_sum_M = tl.load(part_sum_ptr + state_M, mask=is_state_M, other=1.0)
        part_MD = tl.load(part_ptr + state_M[:, None] * D + d_D[None, :], mask=mask_MD, other=0.0)
        new_max_M = tl.maximum(max_M, part_max_M)
        rescale_M, part_rescale_M = tl.exp(max_M - new_max_M), tl.exp(part_max_M - new_max_M)
        sum_M = sum_M * rescale_M + part_sum_M * part_rescale_M
        acc_MD = acc_MD * rescale_M[:, None] + part_MD * part_rescale_M[:, None]
        max_M = new_max_M
        part_ptr += num_states.to(tl.int64) * D
        part_max_ptr += num_states
        part_sum_ptr += num_states
    state_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + state_M, max_M + tl.log(sum_M), mask=is_state_M)
    out_MD = (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + state_M[:, None] * D + d_D[None, :], out_MD, mask=mask_MD)


@triton.jit(do_not_specialize=["num_queries", "grid_width", "num_images"])
def term_gradients_kernel(
    value_ptr,
    image_ptr,
    query_term_ptr,
    index_term_ptr,
    rank_ptr,
    reference_ptr,
    out_ptr,
    lse_ptr,
    grad_out_ptr,
    grad_query_term_ptr,
    grad_index_term_ptr,
    num_queries,
    grid_width,
    num_images,
    value_stride_j,
    value_stride_s,
    value_stride_h,
    rank_stride_b,
    rank_stride_q,
    rank_stride_n,
    reference_stride_b,
    reference_stride_q,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVEL_SIZES: tl.constexpr,
    LEVEL_STARTS: tl.constexpr,
    BASE_SIZE: tl.constexpr,
    NEEDS_QUERY_TERM: tl.constexpr,
    NEEDS_INDEX_TERM: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
):
    """Gradients of the offsets and logits. Grid: (tiles, B * H, programs that share the points).

    With w the weights, g = grad_out . sample and delta = grad_out . out, a logit's gradient is w (g - delta)
    and a location's is w times the slope of g there. `grad_query_term` is written; `grad_index_term`
    (K, H, E), zero before, is added to, in no fixed order.
    """
    E: tl.constexpr = 2 * P + L * P
    real = query_term_ptr.dtype.element_ty
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H

    # 1. Rows, the images they see, and what a query's samples share.
    query_R, _slot_R, is_query_R = _tile_rows(num_queries, grid_width, TILE_WIDTH, TILE_HEIGHT, 1)
    rank_pointer_R = rank_ptr + b * rank_stride_b + query_R * rank_stride_q
    first, end = _visible_range(rank_pointer_R, is_query_R, num_images, rank_stride_n)
    reference_pointer_R = reference_ptr + b * reference_stride_b + query_R * reference_stride_q
    reference_x_R = tl.load(reference_pointer_R, mask=is_query_R, other=0.0)
    reference_y_R = tl.load(reference_pointer_R + 1, mask=is_query_R, other=0.0)
    d_D = tl.arange(0, BLOCK_D)
    state = b * num_queries * H + h
    offset_RD = query_R[:, None] * (H * D) + d_D[None, :]
    mask_RD = _with_channels(is_query_R, d_D, BLOCK_D, D)
    grad_out_RD = tl.load(grad_out_ptr + state * D + offset_RD, mask=mask_RD, other=0.0).to(real)
    out_RD = tl.load(out_ptr + state * D + offset_RD, mask=mask_RD, other=0.0).to(real)
    delta_R = tl.sum(grad_out_RD * out_RD, axis=1)
    lse_R = tl.load(lse_ptr + state + query_R * H, mask=is_query_R, other=0.0)

    query_pointer_R = query_term_ptr + state * E + query_R * (H * E)
    grad_pointer_R = grad_query_term_ptr + state * E + query_R * (H * E)
    for point in range(tl.program_id(2), P, tl.num_programs(2)):
        grad_x_R = tl.zeros_like(lse_R)
        grad_y_R = tl.zeros_like(lse_R)
        grad_logits = ()
        for _level in tl.static_range(L):
            grad_logits = grad_logits + (tl.zeros_like(lse_R),)  # noqa: RUF005
        for n in range(first, end):
            # 2. Where the point lies.
            rank_R = tl.load(rank_pointer_R + n * rank_stride_n, mask=is_query_R, other=0).to(tl.int32)
            looks_R = rank_R > 0
            index_pointer_R = index_term_ptr + rank_R * (H * E) + h * E
            query_point_R, index_point_R = query_pointer_R + 2 * point, index_pointer_R + 2 * point
            x_R = reference_x_R + _load_sum(query_point_R, index_point_R, looks_R) / BASE_SIZE
            y_R = reference_y_R + _load_sum(query_point_R + 1, index_point_R + 1, looks_R) / BASE_SIZE
            map_ptr = _map(value_ptr, image_ptr + b * num_images + n, h, value_stride_j, value_stride_h)

            # 3. Gradients of this point in this image, level by level.
            image_x_R = tl.zeros_like(lse_R)
            image_y_R = tl.zeros_like(lse_R)
            image_logits = ()
            for level in tl.static_range(L):
                logit = 2 * P + level * P + point
                logit_R = _load_sum(query_pointer_R + logit, index_pointer_R + logit, looks_R)
                weight_R = tl.where(looks_R, tl.exp(logit_R - lse_R), 0.0)
                column_R, right_R = _first_cell(x_R, LEVEL_SIZES[level])
                line_R, below_R = _first_cell(y_R, LEVEL_SIZES[level])
                sample_R = tl.zeros_like(lse_R)
                slope_x_R = tl.zeros_like(lse_R)
                slope_y_R = tl.zeros_like(lse_R)
                for cell in tl.static_range(4):
                    cell_R, is_on_map_R, share_x_R, share_y_R = _cell(
                        column_R, right_R, line_R, below_R, cell % 2, cell // 2, LEVEL_SIZES[level]
                    )
                    offset_R = (LEVEL_STARTS[level] + cell_R) * value_stride_s
                    cell_RD = tl.load(
                        map_ptr + offset_R[:, None] + d_D[None, :],
                        mask=_with_channels(looks_R & is_on_map_R, d_D, BLOCK_D, D),
                        other=0.0,
                    )
                    product_R = tl.sum(grad_out_RD * cell_RD.to(real), axis=1)
                    sample_R += share_x_R * share_y_R * product_R
                    slope_x_R += (share_y_R if cell % 2 else -share_y_R) * product_R
                    slope_y_R += (share_x_R if cell // 2 else -share_x_R) * product_R
                image_logits = image_logits + (weight_R * (sample_R - delta_R),)  # noqa: RUF005
                image_x_R += weight_R * slope_x_R * (LEVEL_SIZES[level] / BASE_SIZE)
                image_y_R += weight_R * slope_y_R * (LEVEL_SIZES[level] / BASE_SIZE)

            # 4. Added to the query's, and to those of the tile's relative indices: one, at most a few.
            grad_x_R += image_x_R
            grad_y_R += image_y_R
            sums = ()
            for level in tl.static_range(L):
                sums = sums + (grad_logits[level] + image_logits[level],)  # noqa: RUF005
            grad_logits = sums
            if NEEDS_INDEX_TERM:
                greatest = tl.max(rank_R)
                least = tl.min(tl.where(looks_R, rank_R, greatest))
                for rank in range(least, greatest + 1):
                    is_rank_R = looks_R & (rank_R == rank)
                    row_ptr = grad_index_term_ptr + rank * (H * E) + h * E
                    grad_x = tl.sum(tl.where(is_rank_R, image_x_R, 0.0))
                    grad_y = tl.sum(tl.where(is_rank_R, image_y_R, 0.0))
                    tl.atomic_add(row_ptr + 2 * point, grad_x, sem="relaxed")
                    tl.atomic_add(row_ptr + 2 * point + 1, grad_y, sem="relaxed")
                    for level in tl.static_range(L):
                        grad_logit = tl.sum(tl.where(is_rank_R, image_logits[level], 0.0))
                        tl.atomic_add(row_ptr + 2 * P + level * P + point, grad_logit, sem="relaxed")

        # 5. The query's own.
        if NEEDS_QUERY_TERM:
            tl.store(grad_pointer_R + 2 * point, grad_x_R, mask=is_query_R)
            tl.store(grad_pointer_R + 2 * point + 1, grad_y_R, mask=is_query_R)
            for level in tl.static_range(L):
                tl.store(grad_pointer_R + 2 * P + level * P + point, grad_logits[level], mask=is_query_R)


@triton.jit(do_not_specialize=["num_queries", "grid_width", "num_images"])
def value_gradients_kernel(
    image_ptr,
    query_term_ptr,
    index_term_ptr,
    rank_ptr,
    reference_ptr,
    lse_ptr,
    grad_out_ptr,
    grad_value_ptr,
    num_queries,
    grid_width,
    num_images,
    grad_value_stride_j,
    grad_value_stride_s,
    grad_value_stride_h,
    rank_stride_b,
    rank_stride_q,
    rank_stride_n,
    reference_stride_b,
    reference_stride_q,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVEL_SIZES: tl.constexpr,
    LEVEL_STARTS: tl.constexpr,
    BASE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
):
    """Gradients of the values, zero before, added to in no fixed order.

    Grid: (tiles, B * H * blocks of channels, programs that share the points).

    Queries of a tile hit the same cells, often by the dozen (those of a language model all start from the
    same reference point), and additions to memory are what takes the time. So a tile's shares of a cell are
    first added up: a matrix product for each window of 4 x 4 cells.
    """
    E: tl.constexpr = 2 * P + L * P
    SIDE: tl.constexpr = 4
    real = query_term_ptr.dtype.element_ty
    CHANNEL_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    bh = tl.program_id(1) // CHANNEL_BLOCKS
    b, h = (bh // H).to(tl.int64), bh % H

    # 1. Rows, and the images they see.
    query_R, _slot_R, is_query_R = _tile_rows(num_queries, grid_width, TILE_WIDTH, TILE_HEIGHT, 1)
    rank_pointer_R = rank_ptr + b * rank_stride_b + query_R * rank_stride_q
    first, end = _visible_range(rank_pointer_R, is_query_R, num_images, rank_stride_n)
    reference_pointer_R = reference_ptr + b * reference_stride_b + query_R * reference_stride_q
    reference_x_R = tl.load(reference_pointer_R, mask=is_query_R, other=0.0)
    reference_y_R = tl.load(reference_pointer_R + 1, mask=is_query_R, other=0.0)
    d_D = (tl.program_id(1) % CHANNEL_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    cell_C = tl.arange(0, SIDE * SIDE)
    state = b * num_queries * H + h
    offset_RD = query_R[:, None] * (H * D) + d_D[None, :]
    mask_RD = _with_channels(is_query_R, d_D, BLOCK_D, D)
    grad_out_RD = tl.load(grad_out_ptr + state * D + offset_RD, mask=mask_RD, other=0.0).to(real)
    lse_R = tl.load(lse_ptr + state + query_R * H, mask=is_query_R, other=0.0)

    query_pointer_R = query_term_ptr + state * E + query_R * (H * E)
    for n in range(first, end):
        rank_R = tl.load(rank_pointer_R + n * rank_stride_n, mask=is_query_R, other=0).to(tl.int32)
        looks_R = rank_R > 0
        index_pointer_R = index_term_ptr + rank_R * (H * E) + h * E
        map_ptr = _map(
            grad_value_ptr, image_ptr + b * num_images + n, h, grad_value_stride_j, grad_value_stride_h
        )
        for point in range(tl.program_id(2), P, tl.num_programs(2)):
            query_point_R, index_point_R = query_pointer_R + 2 * point, index_pointer_R + 2 * point
            x_R = reference_x_R + _load_sum(query_point_R, index_point_R, looks_R) / BASE_SIZE
            y_R = reference_y_R + _load_sum(query_point_R + 1, index_point_R + 1, looks_R) / BASE_SIZE
            for level in tl.static_range(L):
                # 2. The box of all cells that the tile's queries touch.
                column_R, right_R = _first_cell(x_R, LEVEL_SIZES[level])
                line_R, below_R = _first_cell(y_R, LEVEL_SIZES[level])
                touches_R = looks_R & (column_R >= -1) & (column_R < LEVEL_SIZES[level])
                touches_R = touches_R & (line_R >= -1) & (line_R < LEVEL_SIZES[level])
                left = tl.maximum(tl.min(tl.where(touches_R, column_R, LEVEL_SIZES[level])), 0)
                top = tl.maximum(tl.min(tl.where(touches_R, line_R, LEVEL_SIZES[level])), 0)
                right = tl.minimum(tl.max(tl.where(touches_R, column_R + 2, 0)), LEVEL_SIZES[level])
                bottom = tl.minimum(tl.max(tl.where(touches_R, line_R + 2, 0)), LEVEL_SIZES[level])
                across = tl.maximum((right - left + SIDE - 1) // SIDE, 0)
                down = tl.maximum((bottom - top + SIDE - 1) // SIDE, 0)

                # 3. Window by window: share of each query in each cell, times what is to be shared.
                logit = 2 * P + level * P + point
                logit_R = _load_sum(query_pointer_R + logit, index_pointer_R + logit, touches_R)
                weight_R = tl.where(touches_R, tl.exp(logit_R - lse_R), 0.0)
                place_x_R, place_y_R = column_R + right_R, line_R + below_R
                for window in range(0, across * down):
                    column_C = left + (window % across) * SIDE + cell_C % SIDE
                    line_C = top + (window // across) * SIDE + cell_C // SIDE
                    share_x_CR = 1 - tl.abs(column_C[:, None] - place_x_R[None, :])
                    share_y_CR = 1 - tl.abs(line_C[:, None] - place_y_R[None, :])
                    share_CR = tl.maximum(share_x_CR, 0.0) * tl.maximum(share_y_CR, 0.0) * weight_R[None, :]
                    is_touched_C = (tl.max(share_CR, axis=1) > 0) & (column_C < right) & (line_C < bottom)
                    cell_index_C = LEVEL_STARTS[level] + line_C * LEVEL_SIZES[level] + column_C
                    offset_C = cell_index_C * grad_value_stride_s
                    tl.atomic_add(
                        map_ptr + offset_C[:, None] + d_D[None, :],
                        tl.dot(share_CR, grad_out_RD, input_precision=PRECISION),
                        mask=_with_channels(is_touched_C, d_D, BLOCK_D, D),
                        sem="relaxed",
                    )
