"""Triton kernels of adapters that see their own part of x; triton_dropout.py beside this one launches them.

Of up to three adapters each has a seed, [3] uint32 (see dropout.seed_of), and rank_i columns of u and du, and
rows of a, one adapter's after the other's. x, du and a are of one dtype.
"""

import triton
import triton.language as tl


@triton.jit
def dropped_hidden_kernel(
    x_ptr,
    a_ptr,
    seeds_ptr,
    rows,
    rank_0,
    rank_1,
    rank_2,
    width,
    u_ptr,
    ADAPTERS: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FILLED: tl.constexpr,
):
    """Rows of one adapter's u, and with the first's the zeros; grid (ADAPTERS * cdiv(rows, BLOCK_ROWS),).

    x [rows, IN], a [at least the ranks, IN]; u [rows, width].
    """
    number = tl.program_id(0) % ADAPTERS
    rank, left = _place(number, rank_0, rank_1, rank_2)
    row = (tl.program_id(0) // ADAPTERS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_R)
    u = tl.full([BLOCK_ROWS, BLOCK_R], 0.0, tl.float32)
    for start in tl.range(0, IN, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        x = tl.load(x_ptr + row * IN + inner[None, :], mask=(row < rows) & (inner[None, :] < IN), other=0)
        x = tl.where(_keeps(seeds_ptr, number, row, inner[None, :]), x, 0.0).to(x_ptr.dtype.element_ty)
        mask = (column[None, :] < rank) & (inner[:, None] < IN)
        a = tl.load(a_ptr + (left + column[None, :]) * IN + inner[:, None], mask=mask, other=0)
        u = tl.dot(x, a, u, input_precision="ieee")
    u = (u * _gain(seeds_ptr, number)).to(u_ptr.dtype.element_ty)
    u_ptr += row * width
    tl.store(u_ptr + left + column[None, :], u, mask=(row < rows) & (column[None, :] < rank))
    if number == 0:
        filled = rank_0 + rank_1 + rank_2 + tl.arange(0, FILLED)[None, :]
        zeros = tl.full([BLOCK_ROWS, FILLED], 0.0, u_ptr.dtype.element_ty)
        tl.store(u_ptr + filled, zeros, mask=(row < rows) & (filled < width))


@triton.jit
def dropped_gradients_kernel(
    x_ptr,
    du_ptr,
    seeds_ptr,
    rows,
    rank_0,
    rank_1,
    rank_2,
    width,
    da_ptr,
    IN: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_IN columns of one adapter's dA, of some rows of x; grid (adapters, cdiv(IN, BLOCK_IN), pieces).

    x [rows, IN], du [rows, width]; da [pieces, ranks, IN], float32.
    """
    number, piece = tl.program_id(0), tl.program_id(2)
    rank, left = _place(number, rank_0, rank_1, rank_2)
    inner = (tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN))[None, :]
    column = tl.arange(0, BLOCK_R)
    da = tl.full([BLOCK_R, BLOCK_IN], 0.0, tl.float32)
    first = piece * (BLOCKS_PER_PROGRAM * BLOCK_ROWS)
    for start in tl.range(first, tl.minimum(first + BLOCKS_PER_PROGRAM * BLOCK_ROWS, rows), BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * IN + inner, mask=(row[:, None] < rows) & (inner < IN), other=0)
        x = tl.where(_keeps(seeds_ptr, number, row[:, None], inner), x, 0.0).to(x_ptr.dtype.element_ty)
        mask = (column[:, None] < rank) & (row[None, :] < rows)
        du = tl.load(du_ptr + row[None, :] * width + left + column[:, None], mask=mask, other=0)
        da = tl.dot(du, x, da, input_precision="ieee")
    place = (piece.to(tl.int64) * (rank_0 + rank_1 + rank_2) + left + column[:, None]) * IN + inner
    tl.store(da_ptr + place, da * _gain(seeds_ptr, number), mask=(column[:, None] < rank) & (inner < IN))


@triton.jit
def dropped_added_kernel(
    dx_ptr,
    du_ptr,
    a_ptr,
    seeds_ptr,
    rows,
    rank_0,
    rank_1,
    rank_2,
    width,
    ADAPTERS: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A block of dx, over what was there; grid (cdiv(IN, BLOCK_IN) * cdiv(rows, BLOCK_ROWS),).

    dx [rows, IN], du [rows, width], a [at least the ranks, IN].
    """
    strips: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    row = (tl.program_id(0) // strips * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    inner = (tl.program_id(0) % strips * BLOCK_IN + tl.arange(0, BLOCK_IN))[None, :]
    column = tl.arange(0, BLOCK_R)
    place = row * IN + inner
    inside = (row < rows) & (inner < IN)
    dx = tl.load(dx_ptr + place, mask=inside, other=0).to(tl.float32)
    for number in tl.static_range(ADAPTERS):
        rank, left = _place(number, rank_0, rank_1, rank_2)
        mask = (row < rows) & (column[None, :] < rank)
        du = tl.load(du_ptr + row * width + left + column[None, :], mask=mask, other=0)
        mask = (column[:, None] < rank) & (inner < IN)
        a = tl.load(a_ptr + (left + column[:, None]) * IN + inner, mask=mask, other=0)
        back = tl.dot(du, a, input_precision="ieee") * _gain(seeds_ptr, number)
        dx += tl.where(_keeps(seeds_ptr, number, row, inner), back, 0.0)
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dropped_added_kernel_for_0_3(
    dx_ptr,
    du_ptr,
    a_ptr,
    seeds_ptr,
    rows,
    rank_0,
    rank_1,
    rank_2,
    width,
    _out_ptr,
    ADAPTERS: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The same for releases of jax-triton that pass the aliased output too."""
    dropped_added_kernel(
        dx_ptr,
        du_ptr,
        a_ptr,
        seeds_ptr,
        rows,
        rank_0,
        rank_1,
        rank_2,
        width,
        ADAPTERS,
        IN,
        BLOCK_ROWS,
        BLOCK_IN,
        BLOCK_R,
    )


@triton.jit
def _place(number, rank_0, rank_1, rank_2):
    """(rank, left): how many columns of u are the adapter's, and the first of them."""
    rank = tl.where(number == 0, rank_0, tl.where(number == 1, rank_1, rank_2))
    left = tl.where(number == 0, 0, tl.where(number == 1, rank_0, rank_0 + rank_1))
    return rank, left


@triton.jit
def _keeps(seeds_ptr, number, row, column):
    """Whether the adapter sees the elements in these rows and columns; see dropout.kept."""
    seeds_ptr += 3 * number
    step = tl.load(seeds_ptr + 1)
    start = _mixed(tl.load(seeds_ptr) + row.to(tl.uint32) * step)
    return _mixed(start + column.to(tl.uint32) * step) <= tl.load(seeds_ptr + 2)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def _gain(seeds_ptr, number):
    """What makes up for the elements that are not kept."""
    return 4294967296.0 / (tl.load(seeds_ptr + 3 * number + 2).to(tl.float32) + 1.0)
