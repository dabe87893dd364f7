"""Attention in plain XLA for any device: query chunk by query chunk, forward and backward.

Grouped queries become rows: query head n = (key head, g) at token t is row t*G + g of its key head, so each
product is a plain batched GEMM and every row has one position. What is visible to a row is an interval of
keys, [first, position], because segments are contiguous.

The queries are cut into chunks and the chunks into a few sections. A section sees a static slice of the
keys, from its oldest visible key to its end: the four of a long row skip three quarters of the work above
the causal diagonal. Within a section the chunks run one after the other in a scan, so that neither the
program nor the scores in memory grow with T^2.

The backward pass recomputes the probabilities of a chunk from the log-sum-exp of each row (Dao et al., 2022,
FlashAttention) and sums dk and dv in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lorajax_kernels import segments
from lorajax_kernels.precision import einsum

# One chunk's scores, [B, N, chunk, T] in float32, take about this much; a chunk has MIN_CHUNK tokens or more.
SCORE_BYTES = 128 * 2**20
MIN_CHUNK, MAX_CHUNK = 128, 512
# Each section compiles for about a second per layer, so rows of few tokens get one and long ones up to four.
# A section of one chunk is no scan, and XLA could run it along with others, with the scores of all in memory.
TOKENS_PER_SECTION, MAX_SECTIONS, CHUNKS_PER_SECTION = 4096, 4, 2


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
    chunk: int | None = None,
    sections: int | None = None,
) -> Float[Array, "B T N H"]:
    """See lorajax_kernels.attention.

    Args:
        chunk: query tokens at a time; None chooses by the size of the scores.
        sections: most sections; None chooses by the length of the row.
    """
    del max_segments
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    chunk = chunk or default_chunk(batch, length, heads)
    sections = sections or min(max(length // TOKENS_PER_SECTION, 1), MAX_SECTIONS)
    plan = _plan(length, chunk, sections, group, scale, window, softcap)
    # Keys come before the queries that see them, so padding at the end is invisible to the real queries.
    pad = plan.length - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    first, _ = segments.bounds(jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge"))  # [B, T]
    first = checkpoint_name(first, "segment_bounds")
    if window is not None:
        first = jnp.maximum(first, jnp.arange(plan.length, dtype=jnp.int32) - (window - 1))
    q = q.reshape(batch, plan.length, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    out = _attend(
        plan,
        q.reshape(batch, kv_heads, plan.length * group, head_dim),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
        jnp.repeat(first, group, axis=1),
    )
    out = out.reshape(batch, kv_heads, plan.length, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, plan.length, heads, head_dim)[:, :length]


def default_chunk(batch: int, length: int, heads: int) -> int:
    """Query tokens in one chunk: all of a short row, otherwise few enough to fill the sections."""
    fitting = SCORE_BYTES // (4 * batch * heads * length)
    if length <= min(fitting, MAX_CHUNK):
        return length
    wanted = min(fitting, MAX_CHUNK, length // (MAX_SECTIONS * CHUNKS_PER_SECTION))
    return max(wanted // MIN_CHUNK, 1) * MIN_CHUNK


@dataclass(frozen=True)
class _Section:
    """Consecutive chunks that see the same static slice of the keys."""

    first_chunk: int
    chunks: int
    first_key: int
    end_key: int


@dataclass(frozen=True)
class _Plan:
    """All that is static. `length`: T padded to whole chunks; `rows`: tokens times group of one chunk."""

    length: int
    rows: int
    group: int
    sections: tuple[_Section, ...]
    scale: float
    softcap: float | None


def _plan(
    length: int,
    chunk: int,
    sections: int,
    group: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> _Plan:
    chunks = -(-length // chunk)
    if chunks == 1:
        chunk = length
    else:
        chunk = min(chunk, -(-length // (chunks * 8)) * 8)  # even chunks need less padding
        chunks = -(-length // chunk)
    count = max(1, min(sections, chunks // CHUNKS_PER_SECTION))
    cut = []
    start = 0
    for index in range(count):
        end = chunks * (index + 1) // count
        oldest = 0 if window is None else max(0, start * chunk - (window - 1))
        cut.append(_Section(start, end - start, oldest, end * chunk))
        start = end
    return _Plan(chunks * chunk, chunk * group, group, tuple(cut), scale, softcap)


Rows = Float[Array, "B K rows H"]
Keys = Float[Array, "B K S H"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: Rows, k: Keys, v: Keys, first: Int[Array, "B rows"]) -> Rows:
    return _forward(plan, q, k, v, first)[0]


def _forward(plan: _Plan, q: Rows, k: Keys, v: Keys, first: Array) -> tuple[Array, Array]:
    """Output, and log-sum-exp [B, K, rows] in float32."""
    outs, lses = [], []
    for section in plan.sections:
        keys = slice(section.first_key, section.end_key)

        def chunk(carry, start, section=section, k=k[:, :, keys], v=v[:, :, keys]):
            scores = _scores(plan, section, _cut(plan, q, start), k, _cut(plan, first, start, 1), start)
            top = jnp.max(scores, axis=-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, axis=-1, keepdims=True)
            out = einsum("bkrs,bksh->bkrh", p.astype(v.dtype), v) / total
            return carry, (out.astype(q.dtype), (top + jnp.log(total))[..., 0])

        _, (out, lse) = _over_chunks(plan, section, chunk, None)
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def _attend_forward(plan: _Plan, q: Rows, k: Keys, v: Keys, first: Array):
    out, lse = _forward(plan, q, k, v, first)
    out, lse = checkpoint_name(out, "attention_output"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first, out, lse)


def _attend_backward(plan: _Plan, residuals, dout: Rows):
    # Without the barrier XLA would keep a single chunk's scores from the forward pass, not recompute them.
    q, k, v, first, out, lse, dout = jax.lax.optimization_barrier((*residuals, dout))
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, K, rows]
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for section in plan.sections:
        keys = slice(section.first_key, section.end_key)

        def chunk(carry, start, section=section, k=k[:, :, keys], v=v[:, :, keys]):
            dk, dv = carry
            q_rows, dout_rows = _cut(plan, q, start), _cut(plan, dout, start)
            scores = _scores(plan, section, q_rows, k, _cut(plan, first, start, 1), start)
            p = jnp.exp(scores - _cut(plan, lse, start)[..., None])  # [B, K, rows, S]
            dp = einsum("bkrh,bksh->bkrs", dout_rows, v)
            ds = p * (dp - _cut(plan, delta, start)[..., None])
            if plan.softcap is not None:
                # Scores are -inf where masked; there p, and so ds, is 0.
                slope = 1 - jnp.square(scores / plan.softcap)
                ds = ds * jnp.where(jnp.isfinite(scores), slope, 0.0)
            p, ds = p.astype(q.dtype), (ds * plan.scale).astype(q.dtype)
            dk = dk + einsum("bkrs,bkrh->bksh", ds, q_rows)
            dv = dv + einsum("bkrs,bkrh->bksh", p, dout_rows)
            return (dk, dv), einsum("bkrs,bksh->bkrh", ds, k).astype(q.dtype)

        (dk_part, dv_part), dq = _over_chunks(plan, section, chunk, (dk[:, :, keys], dv[:, :, keys]))
        dk, dv = dk.at[:, :, keys].set(dk_part), dv.at[:, :, keys].set(dv_part)
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(plan: _Plan, section: _Section, q: Array, k: Array, first: Array, start: Array | int) -> Array:
    """Scaled, capped and masked scores of the rows from `start` on, [B, K, rows, S] float32."""
    # Without the barrier XLA spends most of its compile time on fusing the softmax with the product. It comes
    # before the mask, so that each pass of the softmax masks for itself and no pass is spent on it alone.
    scores = jax.lax.optimization_barrier(einsum("bkrh,bksh->bkrs", q, k)) * plan.scale
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores / plan.softcap)
    position = (start + jnp.arange(plan.rows, dtype=jnp.int32)) // plan.group
    key = jnp.arange(section.first_key, section.end_key, dtype=jnp.int32)
    visible = (key >= first[:, :, None]) & (key <= position[:, None])  # [B, rows, S]
    return jnp.where(visible[:, None], scores, -jnp.inf)


def _cut(plan: _Plan, x: Array, start: Array | int, axis: int = 2) -> Array:
    """The rows of the chunk that starts at row `start`."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + plan.rows, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, plan.rows, axis=axis)


def _over_chunks(plan: _Plan, section: _Section, chunk: Callable, carry):
    """Run `chunk(carry, start)` for each chunk; what it returns per row is joined along axis 2."""
    if section.chunks == 1:
        return chunk(carry, section.first_chunk * plan.rows)
    starts = plan.rows * (section.first_chunk + jnp.arange(section.chunks, dtype=jnp.int32))
    carry, parts = jax.lax.scan(chunk, carry, starts)  # parts: [chunks, B, K, rows, ...]

    def join(part: Array) -> Array:
        part = jnp.moveaxis(part, 0, 2)
        return part.reshape(*part.shape[:2], section.chunks * plan.rows, *part.shape[4:])

    return carry, jax.tree.map(join, parts)
