"""Attention of one new token per row over a key/value cache, for decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax_kernels.checks import (
    at_least_int32,
    check_arrays,
    check_dtype,
    check_lengths,
    check_not_empty,
    check_options,
)
from lorajax_kernels.precision import einsum


def cached_attention(
    q: Float[Array, "B 1 N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Attend from the last token of each row to the row's cache.

    Args:
        q: the query at position lengths[b] - 1 of row b; float32, bfloat16 or float16.
        k_cache, v_cache: entries 0..lengths[b]-1 are valid; the rest must be finite and counts for nothing.
            XLA copies caches that are not swapaxes(1, 2) of arrays [B, K, S, H], which it reads as they are.
        lengths: tokens in each row, the new one included: 1..S.
        scale: of the scores; default 1/sqrt(H).
        window: the query at t sees the keys at s with t - s < window; default all.
        softcap: scores become softcap * tanh(scores / softcap); default none.

    Returns:
        In q's dtype; scores and softmax are float32.

    Raises:
        ValueError: shapes, dtypes or options do not fit together; in checked mode also for lengths outside
            1..S.
    """
    check_arrays("cached_attention", q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    check_not_empty("cached_attention", q=q, k_cache=k_cache)
    fits = (
        (q.ndim, k_cache.ndim) == (4, 4)
        and q.shape[1] == 1
        and (q.shape[0], q.shape[3]) == (k_cache.shape[0], k_cache.shape[3])
        and q.shape[2] % k_cache.shape[2] == 0
        and v_cache.shape == k_cache.shape
        and lengths.shape == q.shape[:1]
    )
    if not fits:
        raise ValueError(
            "cached_attention needs q [B, 1, N, H], caches [B, S, K, H] with N a multiple of K, and lengths "
            f"[B]; got q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, lengths {lengths.shape}"
        )
    check_dtype("cached_attention", "float32, bfloat16 or float16", q=q)
    check_dtype("cached_attention", "floating point", k_cache=k_cache, v_cache=v_cache)
    check_dtype("cached_attention", "integers", lengths=lengths)
    check_options("cached_attention", scale=scale, softcap=softcap, window=window)
    batch, _, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    check_lengths("cached_attention", lengths, capacity)
    lengths = at_least_int32(lengths)
    scale = head_dim**-0.5 if scale is None else scale
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = einsum("bkgh,bskh->bkgs", grouped, k_cache.astype(q.dtype)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    key = jnp.arange(capacity)
    visible = key < lengths[:, None]  # [B, S]
    if window is not None:
        visible &= key >= lengths[:, None] - min(window, capacity)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = einsum("bkgs,bskh->bkgh", p, v_cache.astype(q.dtype))
    return out.reshape(q.shape).astype(q.dtype)
