"""Triton kernels of layers with adapters; triton.py beside this one launches them."""

import triton
import triton.language as tl


@triton.jit
def scaled_b(
    b_ptr, column, rank, OUT: tl.constexpr, RANK: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):
    """A strip of SCALE b, rounded once."""
    mask = (column[:, None] < OUT) & (rank[None, :] < RANK)
    b = tl.load(b_ptr + column[:, None] * RANK + rank[None, :], mask=mask, other=0)
    return (b.to(tl.float32) * SCALE).to(DTYPE)


@triton.jit
def hidden_and_more_of_b(dy, u, b, db, hidden_ptrs, mask):
    """dy b of a block of rows, stored, and db + dy^T u."""
    hidden = tl.dot(dy, b, input_precision="ieee")
    tl.store(hidden_ptrs, hidden.to(hidden_ptrs.dtype.element_ty), mask=mask)
    return tl.dot(tl.trans(dy), u, db, input_precision="ieee")


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
    SCALE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One strip of BLOCK_OUT columns of dy and BLOCKS_PER_PROGRAM blocks of its rows; grid (strips, pieces).

    dy [rows, OUT], u [rows, U_WIDTH], of which RANK columns from U_START on, b [OUT, RANK]; hidden
    [strips, rows, RANK], db [pieces, OUT, RANK].
    """
    strip = tl.program_id(0)
    piece = tl.program_id(1)
    column = strip * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rank = tl.arange(0, BLOCK_R)
    b = scaled_b(b_ptr, column, rank, OUT, RANK, SCALE, dy_ptr.dtype.element_ty)
    u_ptr += U_START
    db = tl.full([BLOCK_OUT, BLOCK_R], 0.0, tl.float32)
    hidden_ptr += strip.to(tl.int64) * rows * RANK
    first = piece * (BLOCKS_PER_PROGRAM * BLOCK_ROWS)
    for start in tl.range(first, tl.minimum(first + BLOCKS_PER_PROGRAM * BLOCK_ROWS, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        is_row = row[:, None] < rows
        small = is_row & (rank[None, :] < RANK)
        place = row[:, None].to(tl.int64) * OUT + column[None, :]
        dy = tl.load(dy_ptr + place, mask=is_row & (column[None, :] < OUT), other=0)
        u = tl.load(u_ptr + row[:, None] * U_WIDTH + rank[None, :], mask=small, other=0)
        hidden_ptrs = hidden_ptr + row[:, None] * RANK + rank[None, :]
        db = hidden_and_more_of_b(dy, u, b, db, hidden_ptrs, small)
    db_ptr += piece.to(tl.int64) * (OUT * RANK)
    weight = (column[:, None] < OUT) & (rank[None, :] < RANK)
    tl.store(db_ptr + column[:, None] * RANK + rank[None, :], db, mask=weight)


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
        hidden = tl.dot(x, tl.trans(a), hidden, input_precision="ieee")
    hidden = hidden.to(hidden_ptr.dtype.element_ty)
    mask = (row < rows) & (rank[None, :] < RANK)
    tl.store(joined_ptr + IN + rank[None, :], hidden, mask=mask)
    tl.store(hidden_ptr + row.to(tl.int64) * RANK + rank[None, :], hidden, mask=mask)


@triton.jit
def swiglu_backward(dh, gate, up):
    """(dgate, dup, h) in the dtype of dh, gate and up."""
    dtype = dh.dtype
    wide_dh, wide_gate, wide_up = dh.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    sigmoid = 1 / (1 + tl.exp2(wide_gate * -1.4426950408889634))
    # Rounded, as in the forward pass.
    silu = (wide_gate * sigmoid).to(dtype).to(tl.float32)
    dgate = wide_dh * wide_up * (sigmoid + wide_gate * sigmoid * (1 - sigmoid))
    return dgate.to(dtype), (wide_dh * silu).to(dtype), (silu * wide_up).to(dtype)


@triton.jit
def swiglu_backward_kernel(dh_ptr, gate_ptr, up_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """dup over dh, dgate over gate and h over up, of BLOCK elements; grid (cdiv(SIZE, BLOCK),)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < SIZE
    dh = tl.load(dh_ptr + place, mask=mask, other=0)
    gate = tl.load(gate_ptr + place, mask=mask, other=0)
    up = tl.load(up_ptr + place, mask=mask, other=0)
    dgate, dup, h = swiglu_backward(dh, gate, up)
    tl.store(dh_ptr + place, dup, mask=mask)
    tl.store(gate_ptr + place, dgate, mask=mask)
    tl.store(up_ptr + place, h, mask=mask)


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


@triton.jit
def mlp_backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    u_ptr,
    du_ptr,
    gate_b_ptr,
    up_b_ptr,
    rows,
    gate_hidden_ptr,
    up_hidden_ptr,
    gate_db_ptr,
    up_db_ptr,
    da_ptr,
    F: tl.constexpr,
    RANK: tl.constexpr,
    U_WIDTH: tl.constexpr,
    GATE_START: tl.constexpr,
    UP_START: tl.constexpr,
    GATE_SCALE: tl.constexpr,
    UP_SCALE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dup over dh and dgate over gate, and what the adapters need of them and of h = silu(gate) * up.

    One strip of BLOCK_F columns and BLOCKS_PER_PROGRAM blocks of rows; grid (strips, pieces). dh, gate, up
    [rows, F], u [rows, U_WIDTH], of which RANK columns from GATE_START and from UP_START on, du of the layer
    after the gate [rows, RANK], both b [F, RANK]; both hidden [strips, rows, RANK], both db, and da
    transposed, [pieces, F, RANK].
    """
    strip = tl.program_id(0)
    piece = tl.program_id(1)
    dtype = dh_ptr.dtype.element_ty
    column = strip * BLOCK_F + tl.arange(0, BLOCK_F)
    rank = tl.arange(0, BLOCK_R)
    gate_b = scaled_b(gate_b_ptr, column, rank, F, RANK, GATE_SCALE, dtype)
    up_b = scaled_b(up_b_ptr, column, rank, F, RANK, UP_SCALE, dtype)
    gate_db = tl.full([BLOCK_F, BLOCK_R], 0.0, tl.float32)
    up_db = tl.full([BLOCK_F, BLOCK_R], 0.0, tl.float32)
    da = tl.full([BLOCK_F, BLOCK_R], 0.0, tl.float32)
    gate_hidden_ptr += strip.to(tl.int64) * rows * RANK
    up_hidden_ptr += strip.to(tl.int64) * rows * RANK
    first = piece * (BLOCKS_PER_PROGRAM * BLOCK_ROWS)
    for start in tl.range(first, tl.minimum(first + BLOCKS_PER_PROGRAM * BLOCK_ROWS, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        is_row = row < rows
        mask = is_row & (column[None, :] < F)
        small = is_row & (rank[None, :] < RANK)
        place = row.to(tl.int64) * F + column[None, :]
        small_place = row * RANK + rank[None, :]
        u_ptrs = u_ptr + row * U_WIDTH + rank[None, :]
        dh = tl.load(dh_ptr + place, mask=mask, other=0)
        gate = tl.load(gate_ptr + place, mask=mask, other=0)
        up = tl.load(up_ptr + place, mask=mask, other=0)
        gate_u = tl.load(u_ptrs + GATE_START, mask=small, other=0)
        up_u = tl.load(u_ptrs + UP_START, mask=small, other=0)
        du = tl.load(du_ptr + small_place, mask=small, other=0)
        dgate, dup, h = swiglu_backward(dh, gate, up)
        # The masks change nothing, but without them Triton makes each of the three once more for every layout
        # that a dot takes it in, and the registers do not hold that.
        h = tl.where(mask, h, 0.0)
        da = tl.dot(tl.trans(h), du, da, input_precision="ieee")
        dgate = tl.where(mask, dgate, 0.0)
        tl.store(gate_ptr + place, dgate, mask=mask)
        gate_db = hidden_and_more_of_b(dgate, gate_u, gate_b, gate_db, gate_hidden_ptr + small_place, small)
        dup = tl.where(mask, dup, 0.0)
        tl.store(dh_ptr + place, dup, mask=mask)
        up_db = hidden_and_more_of_b(dup, up_u, up_b, up_db, up_hidden_ptr + small_place, small)
    weight = (column[:, None] < F) & (rank[None, :] < RANK)
    weight_place = piece.to(tl.int64) * (F * RANK) + column[:, None] * RANK + rank[None, :]
    tl.store(gate_db_ptr + weight_place, gate_db, mask=weight)
    tl.store(up_db_ptr + weight_place, up_db, mask=weight)
    tl.store(da_ptr + weight_place, da, mask=weight)


@triton.jit
def mlp_backward_kernel_for_0_3(
    dh_ptr,
    gate_ptr,
    up_ptr,
    u_ptr,
    du_ptr,
    gate_b_ptr,
    up_b_ptr,
    rows,
    gate_hidden_ptr,
    up_hidden_ptr,
    gate_db_ptr,
    up_db_ptr,
    da_ptr,
    dup_ptr,
    dgate_ptr,
    F: tl.constexpr,
    RANK: tl.constexpr,
    U_WIDTH: tl.constexpr,
    GATE_START: tl.constexpr,
    UP_START: tl.constexpr,
    GATE_SCALE: tl.constexpr,
    UP_SCALE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The same for releases of jax-triton that pass the aliased outputs too."""
    mlp_backward_kernel(
        dh_ptr,
        gate_ptr,
        up_ptr,
        u_ptr,
        du_ptr,
        gate_b_ptr,
        up_b_ptr,
        rows,
        gate_hidden_ptr,
        up_hidden_ptr,
        gate_db_ptr,
        up_db_ptr,
        da_ptr,
        F,
        RANK,
        U_WIDTH,
        GATE_START,
        UP_START,
        GATE_SCALE,
        UP_SCALE,
        BLOCKS_PER_PROGRAM,
        BLOCK_ROWS,
        BLOCK_F,
        BLOCK_R,
    )
