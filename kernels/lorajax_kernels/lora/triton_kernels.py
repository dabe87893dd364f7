"""Triton kernels of layers with adapters; triton.py beside this one launches them."""

import triton
import triton.language as tl


@triton.jit
def hidden_and_b_kernel(
    dy_ptr,
    u_ptr,
    b_ptr,
    rows,
    hidden_ptr,
    db_ptr,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    U_WIDTH: tl.constexpr,
    U_START: tl.constexpr,
    B_START: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One strip of BLOCK_OUT columns of dy and BLOCKS_PER_PROGRAM blocks of its rows; grid (strips, pieces).

    dy [rows, OUT], u [rows, U_WIDTH], of which RANK columns from U_START on, b [OUT, RANK] from its element
    B_START on; hidden [strips, rows, RANK], db [pieces, OUT, RANK].
    """
    strip = tl.program_id(0)
    piece = tl.program_id(1)
    column = strip * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rank = tl.arange(0, BLOCK_R)
    weight = (column[:, None] < OUT) & (rank[None, :] < RANK)
    b = tl.load(b_ptr + B_START + column[:, None] * RANK + rank[None, :], mask=weight, other=0)
    b = (b.to(tl.float32) * SCALE).to(dy_ptr.dtype.element_ty)
    u_ptr += U_START
    db = tl.full([BLOCK_OUT, BLOCK_R], 0.0, tl.float32)
    hidden_ptr += strip.to(tl.int64) * rows * RANK
    first = piece * (BLOCKS_PER_PROGRAM * BLOCK_ROWS)
    for start in tl.range(first, tl.minimum(first + BLOCKS_PER_PROGRAM * BLOCK_ROWS, rows), BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
        is_row = row < rows
        small = is_row & (rank[None, :] < RANK)
        dy = tl.load(dy_ptr + row * OUT + column[None, :], mask=is_row & (column[None, :] < OUT), other=0)
        u = tl.load(u_ptr + row * U_WIDTH + rank[None, :], mask=small, other=0)
        hidden = tl.dot(dy, b, input_precision="ieee")
        hidden = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * RANK + rank[None, :], hidden, mask=small)
        db = tl.dot(tl.trans(dy), u, db, input_precision="ieee")
    db_ptr += piece.to(tl.int64) * (OUT * RANK)
    tl.store(db_ptr + column[:, None] * RANK + rank[None, :], db, mask=weight)


@triton.jit
def hidden_sums_kernel(
    p0_ptr,
    p1_ptr,
    p2_ptr,
    inverse_ptr,
    rows,
    strips_0,
    rank_0,
    strips_1,
    rank_1,
    strips_2,
    rank_2,
    ranks,
    width,
    all_ptr,
    scaled_ptr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Rows of one adapter's sum, and with the first's the zeros; grid (cdiv(rows, BLOCK_ROWS), adapters).

    p_i [strips_i, rows, rank_i], inverse [rows]; all [rows, width]: the sums over strips side by side, and
    zeros; scaled [rows, ranks], if SCALED: the sums times inverse.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_R)[None, :]
    number = tl.program_id(1)
    if number == 0:
        total = _sum_of_strips(p0_ptr, strips_0, rank_0, rows, row, column)
        filled = ranks + tl.arange(0, FILLED)[None, :]
        zeros = tl.full([BLOCK_ROWS, FILLED], 0.0, all_ptr.dtype.element_ty)
        tl.store(all_ptr + row * width + filled, zeros, mask=(row < rows) & (filled < width))
    elif number == 1:
        total = _sum_of_strips(p1_ptr, strips_1, rank_1, rows, row, column)
    else:
        total = _sum_of_strips(p2_ptr, strips_2, rank_2, rows, row, column)
    rank = tl.where(number == 0, rank_0, tl.where(number == 1, rank_1, rank_2))
    left = tl.where(number == 0, 0, tl.where(number == 1, rank_0, rank_0 + rank_1))
    inside = (row < rows) & (column < rank)
    total = total.to(all_ptr.dtype.element_ty)
    tl.store(all_ptr + row * width + left + column, total, mask=inside)
    if SCALED:
        inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0)
        scaled = (total.to(tl.float32) * inverse).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + row * ranks + left + column, scaled, mask=inside)


@triton.jit
def _sum_of_strips(p_ptr, strips, rank, rows, row, column):
    """Of p [strips, rows, rank], at these rows and columns; float32, 0 beyond its edges."""
    inside = (row < rows) & (column < rank)
    place = row * rank + column
    total = tl.full(place.shape, 0.0, tl.float32)
    for _strip in range(strips):
        total += tl.load(p_ptr + place, mask=inside, other=0).to(tl.float32)
        place += tl.cast(rows, tl.int64) * rank
    return total


@triton.jit
def operands_kernel(
    vector_ptr,
    inner,
    rows,
    start,
    width,
    out_0,
    rank_0,
    start_0,
    left_0,
    window_0,
    out_1,
    rank_1,
    start_1,
    left_1,
    window_1,
    out_2,
    rank_2,
    start_2,
    left_2,
    window_2,
    stacked_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    SCALE_0: tl.constexpr,
    SCALE_1: tl.constexpr,
    SCALE_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a result; the results lie one after the other over the programs; grid (programs,).

    vector [N] has A [rows, inner] at start, and B [out_i, rank_i] at start_i. stacked [width, inner]: A and
    rows of zeros; s_i [out_i, window_i]: SCALE_i B in the columns from left_i on, and columns of zeros.

    Sizes are no constants: a kernel takes longer to compile than it ever runs.
    """
    program = tl.program_id(0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(vector_ptr + start + place, mask=place < rows * inner, other=0)
    tl.store(stacked_ptr + place, a.to(stacked_ptr.dtype.element_ty), mask=place < width * inner)
    program -= (width * inner + BLOCK - 1) // BLOCK
    _in_columns(vector_ptr + start_0, s0_ptr, program, out_0, rank_0, left_0, window_0, SCALE_0, BLOCK)
    program -= (out_0 * window_0 + BLOCK - 1) // BLOCK
    _in_columns(vector_ptr + start_1, s1_ptr, program, out_1, rank_1, left_1, window_1, SCALE_1, BLOCK)
    program -= (out_1 * window_1 + BLOCK - 1) // BLOCK
    _in_columns(vector_ptr + start_2, s2_ptr, program, out_2, rank_2, left_2, window_2, SCALE_2, BLOCK)


@triton.jit
def _in_columns(b_ptr, s_ptr, program, out, rank, left, window, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the program's share of s [out, window], if it has one."""
    if (program >= 0) & (program * BLOCK < out * window):
        place = program * BLOCK + tl.arange(0, BLOCK)
        row, column = place // window, place % window - left
        inside = place < out * window
        own = inside & (column >= 0) & (column < rank)
        b = tl.load(b_ptr + row * rank + column, mask=own, other=0)
        tl.store(s_ptr + place, (b * SCALE).to(s_ptr.dtype.element_ty), mask=inside)


@triton.jit
def hidden_and_joined_kernel(
    x_ptr,
    a_ptr,
    rows,
    hidden_ptr,
    joined_ptr,
    IN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """u = x a^T of one block of rows, and [x, u] beside it; grid (cdiv(rows, BLOCK_ROWS),).

    x [rows, IN], a [RANK, IN]; hidden [rows, RANK], joined [rows, IN + RANK].
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    rank = tl.arange(0, BLOCK_R)
    x_ptr += row.to(tl.int64) * IN
    joined_ptr += row.to(tl.int64) * (IN + RANK)
    hidden = tl.full([BLOCK_ROWS, BLOCK_R], 0.0, tl.float32)
    for start in tl.range(0, IN, BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)
        mask = (row < rows) & (column[None, :] < IN)
        x = tl.load(x_ptr + column[None, :], mask=mask, other=0)
        tl.store(joined_ptr + column[None, :], x, mask=mask)
        weight = (rank[:, None] < RANK) & (column[None, :] < IN)
        a = tl.load(a_ptr + rank[:, None] * IN + column[None, :], mask=weight, other=0)
        # Out of registers: of what is both stored and multiplied Triton 3.6 keeps one buffer too few, and on
        # Hopper a block that comes in overwrites the one that a product still reads.
        hidden = tl.dot(tl.where(mask, x, 0.0), tl.trans(a), hidden, input_precision="ieee")
    hidden = hidden.to(hidden_ptr.dtype.element_ty)
    mask = (row < rows) & (rank[None, :] < RANK)
    tl.store(joined_ptr + IN + rank[None, :], hidden, mask=mask)
    tl.store(hidden_ptr + row.to(tl.int64) * RANK + rank[None, :], hidden, mask=mask)


@triton.jit
def swiglu_backward_kernel(dh_ptr, gate_ptr, up_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """dup over dh, dgate over gate and h over up, of BLOCK elements; grid (cdiv(SIZE, BLOCK),)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < SIZE
    dh = tl.load(dh_ptr + place, mask=mask, other=0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0).to(tl.float32)
    dtype = dh_ptr.dtype.element_ty
    sigmoid = 1 / (1 + tl.exp2(gate * -1.4426950408889634))
    # Rounded, as in the forward pass.
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    dgate = dh * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    tl.store(dh_ptr + place, (dh * silu).to(dtype), mask=mask)
    tl.store(gate_ptr + place, dgate.to(dtype), mask=mask)
    tl.store(up_ptr + place, (silu * up).to(dtype), mask=mask)


@triton.jit
def swiglu_backward_kernel_for_0_3(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dup_ptr,
    dgate_ptr,
    h_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for releases of jax-triton that pass the aliased outputs too."""
    swiglu_backward_kernel(dh_ptr, gate_ptr, up_ptr, SIZE, BLOCK)
