"""Segments of packed rows: a segment is a maximal run of equal ids along a row.

Since segments are contiguous, two integers per token say all that a causal attention kernel has to know about
them, and no [T, T] mask is ever built here. Id 0 (padding, by convention) is a segment like any other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def bounds(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and one-past-last index of each token's segment.

    Args:
        segment_ids: any integers; equal neighbours belong to one segment.

    Returns:
        (k_start, q_end), int32 [B, T]: the query at t sees the keys k_start[t]..t, and the key at s is seen
        by the queries s..q_end[s]-1.
    """
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T-1]
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    k_start = jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    q_end = jax.lax.cummin(jnp.where(is_last, index + 1, length), axis=1, reverse=True)
    return k_start, q_end


def positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its segment, from 0, int32."""
    k_start, _ = bounds(segment_ids)
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32) - k_start


def lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of tokens of each token's segment, int32."""
    k_start, q_end = bounds(segment_ids)
    return q_end - k_start
