"""Triton kernels of FlashAttention-2 (Dao, 2023) for packed rows; triton.py beside this one launches them.

q, out and their gradients are [B, T, N, H], k, v and theirs [B, T, K, H], first and end int32 [B, T], lse and
delta float32 [B, N, T]. T is a multiple of every block. The query at t sees the keys first[t]..t, and the key
at s is seen by the queries s..end[s]-1. Neither array decreases along T, so its values at both ends of a
block bound those within: a block of queries or keys visits only the blocks it shares a visible pair with, and
masks single pairs only in those that hold an invisible one too, where a segment or window begins or ends and
on the diagonal.

Everything exponential is to base 2. A score is z * FACTOR, where z is the product q k^T, or its tanh if
scores are capped; FACTOR, which is positive, holds log2(e) and the scale or the cap. lse is log2 of a row's
sum of exp2(score).

SPLIT says how blocks with a mask are told from those without. With it each kind has a loop of its own.
Without it one loop branches: less code, fewer registers, and loads that are waited for once, not once per
loop. But where Triton lays out products by mma.sync (Ampere, Ada), it follows the result of one to the next
only within a loop's own region. Behind a branch it no longer finds that probabilities are an operand, and
moves them through shared memory; there SPLIT keeps them in registers.
"""

import triton
import triton.language as tl

# Below every score yet finite: a row that has seen masked keys alone has exp2(LOWEST - LOWEST) = 1, not NaN.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    first_ptr,
    length,
    out_ptr,
    lse_ptr,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Output and lse of one block of queries of one head; grid (N, T / BLOCK_Q, B)."""
    head = tl.program_id(0)
    # Late queries see the most keys: they start first, so that the last programs to run are short ones.
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    row = tl.program_id(2).to(tl.int64) * length
    lo, mid, diagonal = _key_ranges(first_ptr + row, q_start, BLOCK_Q, BLOCK_K)
    hi = q_start + BLOCK_Q
    query = q_start + tl.arange(0, BLOCK_Q)
    first = tl.load(first_ptr + row + query)

    kv_head = head // (HEADS // KV_HEADS)
    q_ptr = _head(q_ptr, row, head, HEADS, HEAD_DIM)
    k_ptr = _head(k_ptr, row, kv_head, KV_HEADS, HEAD_DIM)
    v_ptr = _head(v_ptr, row, kv_head, KV_HEADS, HEAD_DIM)
    q = _load(q_ptr, q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
    out = tl.full([BLOCK_Q, BLOCK_H], 0.0, tl.float32)
    top = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    # fmt: off
    if SPLIT:
        out, top, total = _forward_keys(
            out, top, total, q, k_ptr, v_ptr, query, first, lo, mid, mid, mid,
            FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "all",
        )
        out, top, total = _forward_keys(
            out, top, total, q, k_ptr, v_ptr, query, first, mid, diagonal, mid, diagonal,
            FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "none",
        )
        out, top, total = _forward_keys(
            out, top, total, q, k_ptr, v_ptr, query, first, diagonal, hi, hi, hi,
            FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "all",
        )
    else:
        out, top, total = _forward_keys(
            out, top, total, q, k_ptr, v_ptr, query, first, lo, hi, mid, diagonal,
            FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "some",
        )
    # fmt: on
    out_ptr = _head(out_ptr, row, head, HEADS, HEAD_DIM)
    _store(out_ptr, q_start, out / total[:, None], HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
    tl.store(_per_query(lse_ptr, row, head, length, HEADS) + query, top + tl.log2(total))


@triton.jit
def _forward_keys(
    out,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    query,
    first,
    start,
    stop,
    mid,
    diagonal,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over the blocks of keys from start to stop."""
    for k_start in tl.range(start, stop, BLOCK_K):
        k = _load(k_ptr, k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
        z = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), TANH_FACTOR)
        if MASKED == "some":
            if (k_start < mid) | (k_start >= diagonal):
                z = tl.where(_visible_keys(query, first, k_start, BLOCK_K), z, float("-inf"))
        elif MASKED == "all":
            z = tl.where(_visible_keys(query, first, k_start, BLOCK_K), z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1) * FACTOR)
        p = tl.exp2(z * FACTOR - new_top[:, None])
        fading = tl.exp2(top - new_top)
        total = total * fading + tl.sum(p, 1)
        v = _load(v_ptr, k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
        out = tl.dot(p.to(v.dtype), v, out * fading[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    first_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    length,
    dq_ptr,
    delta_ptr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dq and delta = sum(dout * out) of one block of queries of one head; grid (N, T / BLOCK_Q, B)."""
    head = tl.program_id(0)
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    row = tl.program_id(2).to(tl.int64) * length
    lo, mid, diagonal = _key_ranges(first_ptr + row, q_start, BLOCK_Q, BLOCK_K)
    hi = q_start + BLOCK_Q
    query = q_start + tl.arange(0, BLOCK_Q)
    first = tl.load(first_ptr + row + query)

    out = _load(_head(out_ptr, row, head, HEADS, HEAD_DIM), q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
    dout = _load(_head(dout_ptr, row, head, HEADS, HEAD_DIM), q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(_per_query(delta_ptr, row, head, length, HEADS) + query, delta)
    lse = tl.load(_per_query(lse_ptr, row, head, length, HEADS) + query)

    kv_head = head // (HEADS // KV_HEADS)
    q_ptr = _head(q_ptr, row, head, HEADS, HEAD_DIM)
    k_ptr = _head(k_ptr, row, kv_head, KV_HEADS, HEAD_DIM)
    v_ptr = _head(v_ptr, row, kv_head, KV_HEADS, HEAD_DIM)
    q = _load(q_ptr, q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
    dq = tl.full([BLOCK_Q, BLOCK_H], 0.0, tl.float32)
    # fmt: off
    if SPLIT:
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_ptr, v_ptr, query, first, lo, mid, mid, mid,
            SCALE, FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "all",
        )
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_ptr, v_ptr, query, first, mid, diagonal, mid, diagonal,
            SCALE, FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "none",
        )
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_ptr, v_ptr, query, first, diagonal, hi, hi, hi,
            SCALE, FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "all",
        )
    else:
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_ptr, v_ptr, query, first, lo, hi, mid, diagonal,
            SCALE, FACTOR, TANH_FACTOR, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K, "some",
        )
    # fmt: on
    dq_ptr = _head(dq_ptr, row, head, HEADS, HEAD_DIM)
    _store(dq_ptr, q_start, _scaled_late(dq, q, SCALE), HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)


@triton.jit
def _dq_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    query,
    first,
    start,
    stop,
    mid,
    diagonal,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq, summed over the blocks of keys from start to stop; see _rounded for its scale."""
    for k_start in tl.range(start, stop, BLOCK_K):
        k = _load(k_ptr, k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
        v = _load(v_ptr, k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
        z = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), TANH_FACTOR)
        p = tl.exp2(z * FACTOR - lse[:, None])
        if MASKED == "some":
            if (k_start < mid) | (k_start >= diagonal):
                p = tl.where(_visible_keys(query, first, k_start, BLOCK_K), p, 0.0)
        elif MASKED == "all":
            p = tl.where(_visible_keys(query, first, k_start, BLOCK_K), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = _uncapped(p * (dp - delta[:, None]), z, TANH_FACTOR)
        dq = tl.dot(_rounded(ds, k, SCALE), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    end_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    length,
    dk_ptr,
    dv_ptr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dk and dv of one block of keys of one key head; grid (K * PARTS, T / BLOCK_K, B).

    The query heads of a key head are shared out over PARTS programs. Each writes the sum over its own to a
    head of [B, T, K * PARTS, H], where those of a key head follow one another.
    """
    OUT_HEADS: tl.constexpr = KV_HEADS * PARTS
    GROUP: tl.constexpr = HEADS // OUT_HEADS
    out_head = tl.program_id(0)
    kv_head = out_head // PARTS
    # Early keys are seen by the most queries, so that the programs already come in the order of falling work.
    k_start = tl.program_id(1) * BLOCK_K
    row = tl.program_id(2).to(tl.int64) * length
    lo, diagonal, mid, hi = _query_ranges(end_ptr + row, k_start, BLOCK_Q, BLOCK_K)
    key = k_start + tl.arange(0, BLOCK_K)
    end = tl.load(end_ptr + row + key)

    head = out_head * GROUP
    q_ptr = _head(q_ptr, row, head, HEADS, HEAD_DIM)
    dout_ptr = _head(dout_ptr, row, head, HEADS, HEAD_DIM)
    lse_ptr = _per_query(lse_ptr, row, head, length, HEADS)
    delta_ptr = _per_query(delta_ptr, row, head, length, HEADS)
    k = _load(_head(k_ptr, row, kv_head, KV_HEADS, HEAD_DIM), k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
    v = _load(_head(v_ptr, row, kv_head, KV_HEADS, HEAD_DIM), k_start, KV_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
    dk = tl.full([BLOCK_K, BLOCK_H], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, BLOCK_H], 0.0, tl.float32)
    # fmt: off
    if SPLIT:
        dk, dv = _dkv_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, length, key, end, lo, diagonal, hi, hi,
            SCALE, FACTOR, TANH_FACTOR, HEADS, GROUP, HEAD_DIM, BLOCK_H, BLOCK_Q, "all",
        )
        dk, dv = _dkv_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, length, key, end, diagonal, mid, diagonal, mid,
            SCALE, FACTOR, TANH_FACTOR, HEADS, GROUP, HEAD_DIM, BLOCK_H, BLOCK_Q, "none",
        )
        dk, dv = _dkv_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, length, key, end, mid, hi, hi, hi,
            SCALE, FACTOR, TANH_FACTOR, HEADS, GROUP, HEAD_DIM, BLOCK_H, BLOCK_Q, "all",
        )
    else:
        dk, dv = _dkv_queries(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, length, key, end, lo, hi, diagonal, mid,
            SCALE, FACTOR, TANH_FACTOR, HEADS, GROUP, HEAD_DIM, BLOCK_H, BLOCK_Q, "some",
        )
    # fmt: on
    dk_ptr = _head(dk_ptr, row, out_head, OUT_HEADS, HEAD_DIM)
    dv_ptr = _head(dv_ptr, row, out_head, OUT_HEADS, HEAD_DIM)
    _store(dk_ptr, k_start, _scaled_late(dk, k, SCALE), OUT_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)
    _store(dv_ptr, k_start, dv, OUT_HEADS, HEAD_DIM, BLOCK_H, BLOCK_K)


@triton.jit
def _dkv_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    length,
    key,
    end,
    start,
    stop,
    diagonal,
    mid,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TANH_FACTOR: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv, summed over the blocks of queries from start to stop of GROUP query heads; see _rounded.

    Scores are transposed, [BLOCK_K, BLOCK_Q]: probabilities and their gradients are then left operands of the
    products that follow, which may stay in registers.
    """
    # One loop over blocks and heads, because every loop waits for its first loads.
    for step in tl.range(0, (stop - start) // BLOCK_Q * GROUP):
        q_start = start + step // GROUP * BLOCK_Q
        head = step % GROUP
        column = (head * length + q_start) + tl.arange(0, BLOCK_Q)
        q = _load(q_ptr + head * HEAD_DIM, q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
        dout = _load(dout_ptr + head * HEAD_DIM, q_start, HEADS, HEAD_DIM, BLOCK_H, BLOCK_Q)
        z = _capped(tl.dot(k, tl.trans(q), input_precision="ieee"), TANH_FACTOR)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        lse = tl.load(lse_ptr + column)
        delta = tl.load(delta_ptr + column)
        p = tl.exp2(z * FACTOR - lse[None, :])
        if MASKED == "some":
            if (q_start < diagonal) | (q_start >= mid):
                p = tl.where(_visible_queries(key, end, q_start, BLOCK_Q), p, 0.0)
        elif MASKED == "all":
            p = tl.where(_visible_queries(key, end, q_start, BLOCK_Q), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = _uncapped(p * (dp - delta[None, :]), z, TANH_FACTOR)
        dk = tl.dot(_rounded(ds, q, SCALE), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_ranges(first_ptr, q_start, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(lo, mid, diagonal): a block of queries sees keys from lo on, and all of the keys mid..diagonal-1."""
    oldest = tl.load(first_ptr + q_start)
    newest = tl.load(first_ptr + q_start + (BLOCK_Q - 1))
    diagonal = q_start // BLOCK_K * BLOCK_K
    return oldest // BLOCK_K * BLOCK_K, tl.minimum(_up(newest, BLOCK_K), diagonal), diagonal


@triton.jit
def _query_ranges(end_ptr, k_start, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(lo, diagonal, mid, hi): queries lo..hi-1 see some of a block of keys, diagonal..mid-1 all of it."""
    earliest = tl.load(end_ptr + k_start)
    latest = tl.load(end_ptr + k_start + (BLOCK_K - 1))
    lo = k_start // BLOCK_Q * BLOCK_Q
    diagonal = _up(k_start + BLOCK_K, BLOCK_Q)
    mid = tl.maximum(earliest // BLOCK_Q * BLOCK_Q, diagonal)
    return lo, diagonal, mid, _up(latest, BLOCK_Q)


@triton.jit
def _up(index, BLOCK: tl.constexpr):
    """The next multiple of BLOCK."""
    return (index + (BLOCK - 1)) // BLOCK * BLOCK


@triton.jit
def _visible_keys(query, first, k_start, BLOCK_K: tl.constexpr):
    """Which of the keys k_start..k_start+BLOCK_K-1 each query sees, [BLOCK_Q, BLOCK_K]."""
    # Row by row against constants: sums of k_start and the columns would be made in 64 bits.
    column = tl.arange(0, BLOCK_K)[None, :]
    return (column >= (first - k_start)[:, None]) & (column <= (query - k_start)[:, None])


@triton.jit
def _visible_queries(key, end, q_start, BLOCK_Q: tl.constexpr):
    """Which of the queries q_start..q_start+BLOCK_Q-1 see each key, [BLOCK_K, BLOCK_Q]."""
    column = tl.arange(0, BLOCK_Q)[None, :]
    return (column >= (key - q_start)[:, None]) & (column < (end - q_start)[:, None])


@triton.jit
def _capped(product, TANH_FACTOR: tl.constexpr):
    """z from q k^T: tanh(x) = 1 - 2 / (exp(2x) + 1), where exp(2x) = exp2(TANH_FACTOR * product)."""
    if TANH_FACTOR is None:
        return product
    else:  # only what stands in a branch not taken is left out
        return 1.0 - 2.0 / (tl.exp2(product * TANH_FACTOR) + 1.0)


@triton.jit
def _uncapped(ds, z, TANH_FACTOR: tl.constexpr):
    """The gradient of the scores before the cap from that of the scores."""
    if TANH_FACTOR is None:
        return ds
    else:
        return ds * (1.0 - z * z)


@triton.jit
def _rounded(ds, like, SCALE: tl.constexpr):
    """ds as an operand. float16 may have no room for what is not scaled yet; else the sum is scaled, once."""
    if like.dtype == tl.float16:
        return (ds * SCALE).to(like.dtype)
    else:
        return ds.to(like.dtype)


@triton.jit
def _scaled_late(total, like, SCALE: tl.constexpr):
    """The sum of products with _rounded's results, scaled."""
    if like.dtype == tl.float16:
        return total
    else:
        return total * SCALE


@triton.jit
def _head(pointer, row, head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where a head of [B, T, HEADS, HEAD_DIM] begins in the row whose first token is number `row` of all."""
    return pointer + (row * HEADS + head) * HEAD_DIM


@triton.jit
def _per_query(pointer, row, head, length, HEADS: tl.constexpr):
    """Where a head of [B, HEADS, T] begins in that row."""
    return pointer + row * HEADS + head * length


@triton.jit
def _tile(
    pointer, start, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """Pointers to BLOCK tokens of a head from `start` on, [BLOCK, BLOCK_H]."""
    # Heads start at multiples of 16 bytes, because HEAD_DIM is a multiple of 8.
    pointer = tl.multiple_of(pointer + tl.cast(start, tl.int64) * (HEADS * HEAD_DIM), 16)
    return pointer + tl.arange(0, BLOCK)[:, None] * (HEADS * HEAD_DIM) + tl.arange(0, BLOCK_H)[None, :]


@triton.jit
def _load(
    pointer, start, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK tokens of a head from `start` on, [BLOCK, BLOCK_H]; columns from HEAD_DIM on are 0."""
    tile = _tile(pointer, start, HEADS, HEAD_DIM, BLOCK_H, BLOCK)
    if HEAD_DIM == BLOCK_H:
        return tl.load(tile)
    else:
        return tl.load(tile, mask=tl.arange(0, BLOCK_H)[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _store(
    pointer, start, x, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """Write [BLOCK, BLOCK_H] to the tokens of a head from `start` on."""
    tile = _tile(pointer, start, HEADS, HEAD_DIM, BLOCK_H, BLOCK)
    x = x.to(pointer.dtype.element_ty)
    if HEAD_DIM == BLOCK_H:
        tl.store(tile, x)
    else:
        tl.store(tile, x, mask=tl.arange(0, BLOCK_H)[None, :] < HEAD_DIM)
