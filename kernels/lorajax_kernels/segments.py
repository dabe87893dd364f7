"""Segments of packed rows: a segment is a maximal run of equal ids along a row.

Since segments are contiguous, two integers per token say all that a causal attention kernel has to know about
them, and no [T, T] mask is ever built here. Id 0 (padding, by convention) is a segment like any other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lorajax_kernels.checks import check_arrays, check_dtype, check_options, check_segments


def bounds(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and one-past-last index of each token's segment.

    Args:
        segment_ids: any integers; equal neighbours belong to one segment.

    Returns:
        (k_start, q_end), int32 [B, T]: the query at t sees the keys k_start[t]..t, and the key at s is seen
        by the queries s..q_end[s]-1.

    Raises:
        ValueError: here and below, segment_ids are no integers [B, T].
    """
    _check("bounds", segment_ids)
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    changes = _changes(segment_ids)
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


def ranks(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Which segment of its row each token belongs to, counted from 0, int32."""
    _check("ranks", segment_ids)
    counted = jnp.cumsum(jnp.pad(_changes(segment_ids), ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return counted[:, : segment_ids.shape[1]]  # of no tokens, none


def starts_and_lengths(
    segment_ids: Int[Array, "B T"], max_segments: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """Start and length of the segments of each row, int32, in M = max_segments places.

    A row of fewer segments ends in segments of length 0 that start at T. Of a row of more, those after the
    first M are left out; `jnp.max(ranks(segment_ids)) < max_segments` tells.

    Raises:
        ValueError: max_segments is not 1, 2, ...; in checked mode also for a row of more.
    """
    _check("starts_and_lengths", segment_ids)
    check_options("starts_and_lengths", max_segments=max_segments)
    check_segments("starts_and_lengths", segment_ids, max_segments)
    batch, length = segment_ids.shape
    k_start, q_end = bounds(segment_ids)
    row, rank = jnp.arange(batch)[:, None], ranks(segment_ids)
    # All tokens of a segment write the same values to its place.
    empty = jnp.full((batch, max_segments), length, jnp.int32)
    starts = empty.at[row, rank].set(k_start, mode="drop")
    lengths = jnp.zeros_like(empty).at[row, rank].set(q_end - k_start, mode="drop")
    return starts, lengths


def _changes(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T1"]:
    """Does another segment begin at the token after this one? T1 = T - 1."""
    return segment_ids[:, 1:] != segment_ids[:, :-1]


def _check(op: str, segment_ids: Int[Array, "B T"]) -> None:
    check_arrays(op, segment_ids=segment_ids)
    if len(segment_ids.shape) != 2:
        raise ValueError(f"{op}: segment_ids must be [B, T], got shape {segment_ids.shape}")
    check_dtype(op, "integers", segment_ids=segment_ids)
